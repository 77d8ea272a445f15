"""The machine a benchmark ran on, as far as it decides the figures."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from quicferry.bench.figures import Machine
from quicferry.host import image
from quicferry.host.command import attempt

LIBRARIES = ("aioquic", "nats-py", "podman-compose")


def machine(project: Path, env: Mapping[str, str], extra: Mapping[str, str] | None = None) -> Machine:
    """Gather them; ``extra`` are versions only a variant knows. What can't be had is left out."""
    versions = {"python on the host": platform.python_version()}
    for name in ("quicferry", *LIBRARIES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout, a distribution's own
            versions[name] = importlib.metadata.version(name)
    inside = attempt(
        ["podman", "run", "--rm", "--network", "none", image.IMAGE, "sh", "-c", "python -V; criu --version"],
        timeout=60,
        env=env,
    )
    if found := re.search(r"Python (\S+)", inside.out):
        versions["python in the image"] = found.group(1)
    if found := re.search(r"Version: (\S+)", inside.out):
        versions["criu"] = found.group(1)
    if found := re.search(r"version (\S+)", attempt(["podman", "--version"], timeout=30, env=env).out):
        versions["podman"] = found.group(1)
    return Machine(
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        kernel=platform.release(),
        cpu=_line("/proc/cpuinfo", "model name"),
        cores=os.cpu_count() or 0,
        memory_mb=int((_line("/proc/meminfo", "MemTotal").split() or ["0"])[0]) // 1024,
        load=round(os.getloadavg()[0], 2),
        versions={**versions, **(extra or {})},
        commit=attempt(["git", "-C", project, "rev-parse", "--short", "HEAD"], timeout=10).out.strip(),
    )


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
