"""Faults that come from outside, while a process stands still at its point."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

from tests.faults.parts import LOOK, PATIENCE, Berth, state_of
from tests.faults.world import World

NATS_AWAY: Final = 5.0
OOM_ROOM: Final = 16 * 1024 * 1024
CGROUPS: Final = Path("/sys/fs/cgroup")
HUNGRY: Final = (
    "import sys, os\n"
    "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
    "kept = []\n"
    "while True: kept.append(bytearray(os.urandom(1 << 20)))\n"
)


async def stopped(find: Callable[[], int]) -> int:
    """The PID of the process, once it stands still: who is told to by a file takes that away a moment before."""
    async with asyncio.timeout(PATIENCE):
        while state_of(pid := find()) != "T":
            await asyncio.sleep(LOOK)
    return pid


async def nats_away(world: World) -> None:
    """NATS killed, and started again after five seconds, on the same store."""
    world.nats.stop(signal.SIGKILL)
    await asyncio.sleep(NATS_AWAY)
    await world.nats.start()


@contextlib.asynccontextmanager
async def disk_full(folder: Path) -> AsyncIterator[None]:
    """Not a free byte where the images are kept."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    try:
        yield
    finally:
        ballast.unlink()


async def oom_kill(berth: Berth) -> None:
    """Let the kernel kill the server for lack of memory: its berth gets a limit, and a hungry process beside it."""
    pid = berth.server_pid
    if not pid:
        return
    group, limit = _memory_group(pid)
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    used = int((group / limit.replace("limit_in_bytes", "usage_in_bytes").replace("max", "current")).read_text())
    (group / limit).write_text(str(used + OOM_ROOM))
    hungry = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HUNGRY, str(group)), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE):
            while os.path.exists(f"/proc/{pid}") and state_of(pid) not in ("Z", "X", ""):
                await asyncio.sleep(LOOK)
    finally:
        if hungry.returncode is None:
            hungry.kill()
        await hungry.wait()
        (group / limit).write_text("-1" if "limit" in limit else "max")


def _memory_group(pid: int) -> tuple[Path, str]:
    """The memory cgroup of a process and its limit's file (cgroups(7)), version 1 or 2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return CGROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if number == "0" and (group := CGROUPS / path.lstrip("/")).joinpath("memory.max").exists():
            return group, "memory.max"
    raise AssertionError(f"{pid} is in no memory cgroup")
