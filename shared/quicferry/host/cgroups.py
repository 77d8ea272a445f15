"""Puts CRIU into a berth's cgroup, so that what it restores is accounted and limited as the berth is.

Works on cgroup v1, v2 and hybrid hosts (cgroups(7)), and from a privileged container with ``pid: host``: there
the host's own cgroup mounts are reached through the root of a process that sees them, which is the berth's
conmon (podman's monitor, started by podman beside the container) or PID 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from quicferry.protocol.errors import FerryError

MOUNT: Final = "sys/fs/cgroup"
MAX_DIRS: Final = 256
"""Directories looked at below a container's cgroup, at most."""


def roots(conmon_pid: int) -> list[Path]:
    """Where the host's cgroup mounts may be seen. PID 1 can be out of reach for a root with fewer capabilities."""
    seers = [Path(f"/proc/{pid}/root") for pid in (conmon_pid, 1) if pid > 0]
    return [seer / MOUNT for seer in (*seers, Path("/"))]


def hierarchies(root: Path) -> list[Path]:
    """The mounted hierarchies: the root itself on v2, every controller (and ``unified``) on v1 and hybrid.

    Raises OSError if ``root`` can't be read.
    """
    if (root / "cgroup.controllers").exists():
        return [root]
    # v1's co-mounted controllers are symlinks to one mount (cpu -> cpu,cpuacct): each mount once.
    # Path.resolve() would leave the other process's root for our own.
    mounts: dict[tuple[int, int], Path] = {}
    for child in sorted(root.iterdir()):
        if (child / "cgroup.procs").exists():
            at = child.stat()
            mounts.setdefault((at.st_dev, at.st_ino), child)
    return sorted(mounts.values())


def directories_of(init_pid: int, cgroup_path: str, root: Path) -> list[Path]:
    """Where ``init_pid`` lives in every hierarchy, at or below podman's ``cgroup_path``. Raises OSError.

    The payload may sit in a subgroup of the path that podman names (crun on v2 does that), so the
    directory is the one whose ``cgroup.procs`` lists the process.
    """
    found: list[Path] = []
    for hierarchy in hierarchies(root):
        top = hierarchy / cgroup_path.lstrip("/")
        for seen, (folder, _, _) in enumerate(os.walk(top)):
            if seen >= MAX_DIRS:
                break
            if _lists(Path(folder) / "cgroup.procs", init_pid):
                found.append(Path(folder))
                break
    return found


def join(pid: int, init_pid: int, cgroup_path: str, where: Sequence[Path]) -> list[Path]:
    """Move ``pid`` to where ``init_pid`` lives, seen from the first of the roots ``where`` that shows it.

    Returns the directories joined. Raises FerryError ``machine_unfit`` if the berth has a cgroup and it can't be
    joined. A berth without one (podman's ``--cgroups=disabled``) needs nothing.
    """
    if not cgroup_path:
        return []
    refused: OSError | None = None
    for root in where:
        try:
            folders = directories_of(init_pid, cgroup_path, root)
            for folder in folders:
                (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            refused = error
            continue
        if folders:
            return folders
    why = f"{refused.filename}: {refused.strerror}" if refused else "it is in no hierarchy that the agent sees"
    raise FerryError(
        "machine_unfit",
        f"CRIU can't join the berth's cgroup {cgroup_path} ({why}).",
        hint="Run the agent privileged and with pid: host.",
    )


def _lists(procs: Path, pid: int) -> bool:
    try:
        return str(pid) in procs.read_text(encoding="ascii").split()
    except OSError:
        return False
