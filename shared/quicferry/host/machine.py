"""How podman must be told to behave on this machine: whether its own defaults can start a container."""

from __future__ import annotations

import os
import resource
import tomllib
from pathlib import Path

import msgspec

CONF = "containers/containers.conf"
"""Relative to the project's folder."""
INSTALLED = Path("/etc/containers/containers.conf.d/50-quicferry.conf")
VARIABLE = "CONTAINERS_CONF"

CAP_SYS_RESOURCE = 24
"""Bit of the capability sets (capabilities(7))."""
PODMAN_NOFILE = 1_048_576
"""The limit of open files that podman as root asks for unless told otherwise."""


class Awkward(msgspec.Struct, frozen=True, kw_only=True):
    """What on this machine podman's defaults may stumble over, and what its configuration already says."""

    hybrid_cgroups: bool
    systemd: bool
    sys_resource: bool
    """This process holds CAP_SYS_RESOURCE and can raise limits."""
    nofile_hard: int
    runtime: str | None
    """``runtime`` of containers.conf; None if not set, then podman takes crun where it is installed."""
    crun_installed: bool
    cgroup_manager: str | None
    ulimits_set: bool


def reasons(facts: Awkward) -> list[str]:
    """Why podman, as it is configured now, cannot start a container; empty if it can."""
    found = []
    crun = (facts.runtime or ("crun" if facts.crun_installed else "runc")) == "crun"
    if facts.hybrid_cgroups and crun:
        found.append("cgroups are in hybrid mode, which crun refuses")
    if not facts.systemd and (facts.cgroup_manager or "systemd") == "systemd":
        found.append("PID 1 is not systemd, which podman wants to make its cgroups")
    if not facts.sys_resource and facts.nofile_hard < PODMAN_NOFILE and not facts.ulimits_set:
        found.append("without CAP_SYS_RESOURCE podman's default limits cannot be set")
    return found


def effective_capabilities() -> int:
    """This process's effective capabilities, as the mask of capabilities(7)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def hybrid_cgroups() -> bool:
    """Controllers are in version 1 hierarchies and a version 2 one is mounted beside them (cgroups(7))."""
    root = Path("/sys/fs/cgroup")
    return not (root / "cgroup.controllers").exists() and (root / "unified/cgroup.procs").exists()


def _configuration() -> tuple[dict[str, object], dict[str, object]]:
    """``[engine]`` and ``[containers]`` of containers.conf(5) as podman would merge them."""
    if own := os.environ.get(VARIABLE):
        files = [Path(own)]
    else:
        files = [Path("/usr/share/containers/containers.conf"), Path("/etc/containers/containers.conf")]
        folder = Path("/etc/containers/containers.conf.d")
        files += sorted(folder.glob("*.conf")) if folder.is_dir() else []
    engine: dict[str, object] = {}
    containers: dict[str, object] = {}
    for file in files:
        try:
            parsed = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError):
            continue  # podman itself will complain about a broken file, and better than we could
        engine.update(parsed.get("engine", {}))
        containers.update(parsed.get("containers", {}))
    return engine, containers


def look() -> Awkward:
    """Gather :class:`Awkward` from this machine."""
    engine, containers = _configuration()
    runtime, manager = engine.get("runtime"), engine.get("cgroup_manager")
    return Awkward(
        hybrid_cgroups=hybrid_cgroups(),
        systemd=Path("/run/systemd/system").is_dir(),
        sys_resource=bool(effective_capabilities() >> CAP_SYS_RESOURCE & 1),
        nofile_hard=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        runtime=str(runtime) if runtime else None,
        crun_installed=any(Path(folder, "crun").exists() for folder in ("/usr/bin", "/usr/sbin", "/usr/local/bin")),
        cgroup_manager=str(manager) if manager else None,
        ulimits_set="default_ulimits" in containers,
    )


def environment(project: Path | None = None) -> dict[str, str]:
    """What to add to the environment of podman: nothing, unless its configuration does not do here.

    Another's ``CONTAINERS_CONF`` is never replaced.
    """
    if os.environ.get(VARIABLE) or project is None or not reasons(look()):
        return {}
    return {VARIABLE: str((project / CONF).resolve())}


def install_containers_conf(project: Path) -> list[str]:
    """Put containers.conf where podman finds it by itself, if this machine needs it; returns why.

    So that `podman` and `podman-compose` typed by hand work as well.
    """
    if os.environ.get(VARIABLE) or os.geteuid() != 0:
        return []
    why = reasons(look())
    if why:
        INSTALLED.parent.mkdir(parents=True, exist_ok=True)
        INSTALLED.write_text((project / CONF).read_text())
    return why


def remove_containers_conf() -> None:
    """Undo :func:`install_containers_conf`."""
    if os.environ.get(VARIABLE):
        return  # then it was not ours to configure
    INSTALLED.unlink(missing_ok=True)
