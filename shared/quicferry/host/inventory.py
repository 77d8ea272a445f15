"""What of ours is on the machine, found by label, and the podman-compose that made it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from quicferry.host import processes
from quicferry.host.command import attempt, run
from quicferry.protocol.errors import FerryError

OURS: Final = "io.quicferry"
PROJECT_LABEL: Final = "io.podman.compose.project"
SERVICE_LABEL: Final = "io.podman.compose.service"

OLDEST_COMPOSE: Final = (1, 3)
"""Older podman-compose silently ignores ``pid: host``, ``profiles`` and more."""


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """One of our containers as podman lists it."""

    id: str
    name: str
    service: str
    state: str
    """``running``, ``exited``, ``created`` and so on; ``gone`` where podman has missed the end of a running one."""
    image: str
    """The image's id."""


class _Listed(msgspec.Struct, rename="pascal"):
    """What we read of ``podman ps --format json``."""

    id: str
    names: list[str]
    state: str
    image_id: str = msgspec.field(name="ImageID")
    labels: dict[str, str] | None = None
    pid: int = 0


class _Named(msgspec.Struct):
    """What we read of ``podman network ls`` and ``podman volume ls``; one writes small, the other large."""

    small: str = msgspec.field(name="name", default="")
    large: str = msgspec.field(name="Name", default="")
    small_labels: dict[str, str] | None = msgspec.field(name="labels", default=None)
    large_labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)

    @property
    def name(self) -> str:
        return self.small or self.large

    @property
    def labels(self) -> dict[str, str]:
        return self.small_labels or self.large_labels or {}


def containers(name: str | None, env: Mapping[str, str]) -> list[Container]:
    """Our containers: of one copy, or of all if ``name`` is None."""
    listed = run(
        ["podman", "ps", "--all", "--format", "json", "--filter", f"label={OURS}=1"],
        timeout=30,
        doing="listing containers",
        env=env,
    )
    found = []
    for item in msgspec.json.decode(listed or "[]", type=list[_Listed]):
        labels = item.labels or {}
        if name is None or labels.get(PROJECT_LABEL) == name:
            found.append(
                Container(
                    id=item.id,
                    name=item.names[0] if item.names else item.id[:12],
                    service=labels.get(SERVICE_LABEL, ""),
                    state="gone" if item.state == "running" and _gone(item.pid) else item.state,
                    image=item.image_id,
                )
            )
    return found


def _gone(pid: int) -> bool:
    return pid > 0 and processes.in_host_pid_namespace() and not processes.runs(pid)


def named(kind: str, project: str | None, env: Mapping[str, str]) -> list[str]:
    """Our networks or volumes (``kind`` says which): of one copy of the system, or of all if None."""
    listed = run(["podman", kind, "ls", "--format", "json"], timeout=30, doing=f"listing {kind}s", env=env)
    return [
        item.name
        for item in msgspec.json.decode(listed or "[]", type=list[_Named])
        if item.labels.get(OURS) == "1" and project in (None, item.labels.get(PROJECT_LABEL))
    ]


def podman_compose() -> list[str]:
    """The podman-compose to use: the one installed beside us, or the one on PATH, if it is new enough."""
    beside = Path(sys.executable).with_name("podman-compose")
    found = str(beside) if beside.exists() else shutil.which("podman-compose")
    if found is None:
        raise FerryError(
            "machine_unfit",
            "podman-compose is not installed.",
            hint="make setup puts it into .venv; pip install 'podman-compose>=1.3' elsewhere.",
        )
    version = compose_version(found)
    if version is not None and version < OLDEST_COMPOSE:
        raise FerryError(
            "machine_unfit",
            f"podman-compose {'.'.join(map(str, version))} silently ignores what compose.yaml relies on.",
            hint="Use 1.3 or later: pip install 'podman-compose>=1.3'.",
        )
    return [found]


def compose_version(program: str) -> tuple[int, ...] | None:
    """Its version as numbers; None if it does not tell."""
    said = attempt([program, "--version"], timeout=30).output
    match = re.search(r"podman-compose version:?\s+(\d+)\.(\d+)(?:\.(\d+))?", said)
    return tuple(int(part) for part in match.groups() if part is not None) if match else None
