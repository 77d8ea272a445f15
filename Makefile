# Two commands matter: `make demo` shows it, `make test` proves it. Both begin with `make setup`.

SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E)
BIN := .venv/bin

.PHONY: setup demo bench test test-faults soak fuzz lint clean

setup: ## install what is missing, make .venv, build the image if its inputs changed
	@containers/setup

demo: setup ## move a server from berth A to B and back under a pinging client
	@$(SUDO) $(BIN)/quicferry demo

bench: setup ## the pause in figures, beside the alternatives; BENCH takes flags, such as BENCH="--quick"
	@$(SUDO) $(BIN)/quicferry bench $(BENCH)

test: lint ## everything, the real moves included
	@$(SUDO) $(BIN)/python -m pytest

test-faults: setup ## every fault at every point of a move, as a table; OUT=FILE for JSON, FAULTS takes flags, such as FAULTS="--only nats"
	@$(SUDO) $(BIN)/python -m tests.faults $(if $(OUT),--out $(OUT)) $(FAULTS)

soak: setup ## services moved at random under faults for MINUTES=n; OUT=FILE for JSON, SOAK takes flags, such as SOAK="--seed 7"
	@$(SUDO) $(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30) $(if $(OUT),--out $(OUT)) $(SOAK)

fuzz: setup ## every decoder of what comes from outside under a coverage-guided fuzzer, SECONDS=n each
	@$(BIN)/python -m pip install --quiet 'atheris>=3.0'
	@for target in control-stream nats-message image-manifest; do \
		$(BIN)/python -m tests.fuzz $$target $(or $(SECONDS),60) || exit; done

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean: ## remove containers, volumes, images and what the build kept; packages stay
	@if [ -x $(BIN)/python ]; then $(SUDO) $(BIN)/python -c 'from pathlib import Path; from quicferry.host import compose; compose.clean(Path())'; fi
	@$(SUDO) rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist build
