"""Puts CRIU into a berth's cgroup, so that what it restores is accounted and limited as the berth is.

Works on cgroup v1, v2 and hybrid hosts (cgroups(7)), and from a privileged container with ``pid: host``:
there the host's own cgroup mounts are reached through PID 1's root.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from quicferry.protocol.errors import FerryError

HOST_CGROUPS: Final = Path("/proc/1/root/sys/fs/cgroup")
MAX_DIRS: Final = 256
"""Directories looked at below a container's cgroup, at most."""


def hierarchies(root: Path = HOST_CGROUPS) -> list[Path]:
    """The mounted hierarchies: the root itself on v2, every controller (and ``unified``) on v1 and hybrid."""
    if (root / "cgroup.controllers").exists():
        return [root]
    try:
        # v1's co-mounted controllers are symlinks to one mount (cpu -> cpu,cpuacct): each mount once,
        # told apart by device. Path.resolve() would leave PID 1's root for our own.
        mounts = {child.stat().st_dev: child for child in sorted(root.iterdir()) if child.is_dir()}
    except OSError as error:
        raise FerryError(
            "machine_unfit",
            f"The host's cgroups can't be read at {root}: {error.strerror}.",
            hint="Run the agent privileged and with pid: host.",
        ) from None
    return sorted(folder for folder in mounts.values() if (folder / "cgroup.procs").exists())


def directories_of(init_pid: int, cgroup_path: str, root: Path = HOST_CGROUPS) -> list[Path]:
    """Where ``init_pid`` lives in every hierarchy, at or below podman's ``cgroup_path``.

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


def join(pid: int, init_pid: int, cgroup_path: str, root: Path = HOST_CGROUPS) -> list[Path]:
    """Move ``pid`` to where ``init_pid`` lives; the directories joined.

    Raises FerryError ``machine_unfit`` if the berth has a cgroup and none could be joined. A berth
    without one (podman's ``--cgroups=disabled``) needs nothing.
    """
    if not cgroup_path:
        return []
    joined: list[Path] = []
    refused: OSError | None = None
    for folder in directories_of(init_pid, cgroup_path, root):
        try:
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            refused = error
        else:
            joined.append(folder)
    if not joined or refused is not None:
        why = refused.strerror if refused else "it is in no hierarchy"
        raise FerryError(
            "machine_unfit",
            f"CRIU can't join the berth's cgroup {cgroup_path}: {why}.",
            hint="Run the agent privileged and with pid: host.",
        )
    return joined


def _lists(procs: Path, pid: int) -> bool:
    try:
        return str(pid) in procs.read_text(encoding="ascii").split()
    except OSError:
        return False
