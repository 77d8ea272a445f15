"""``python -m tests.fuzz TARGET SECONDS``: one target under atheris; a finding is written to crash-* and ends it."""

from __future__ import annotations

import atexit
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

import atheris
import structlog

with atheris.instrument_imports(include=["quicferry", "services"]):
    from tests.fuzz.mutate import mutated
    from tests.fuzz.targets import SEEDS, TARGETS


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    corpus = Path(tempfile.mkdtemp(prefix="quicferry-fuzz-"))
    atexit.register(shutil.rmtree, corpus, ignore_errors=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    arguments = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={seconds}",
        "-max_len=200000",
        "-rss_limit_mb=1024",
        "-timeout=5",
    ]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

    def mutator(data: bytes, most_bytes: int, seed: int) -> bytes:
        chance = random.Random(seed)
        match chance.randrange(4):
            case 0:
                return bytes(atheris.Mutate(data, most_bytes))
            case 1:
                return mutated(data, chance, most_bytes)
            case _:
                # libFuzzer keeps what reaches new Python code, and the decoder is C: it would lose these.
                return mutated(chance.choice(SEEDS[name]), chance, most_bytes)

    atheris.Setup(arguments, TARGETS[name], custom_mutator=mutator)
    atheris.Fuzz()


main()
