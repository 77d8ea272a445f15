"""Thread ids inside berths: CRIU's own processes must not have one that the server's threads come back with.

The server's PID is fixed and high, but its threads get the next free numbers of whichever berth they were started in
(pthread_create(3) does not use clone3's set_tid). CRIU restores them with those, so
it is given numbers elsewhere: every move has a range of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from typing import Final

from quicferry.host.command import attempt
from quicferry.host.processes import namespace_pid
from quicferry.protocol.errors import FerryError

FIRST: Final = 10_000
"""Above the server's own PID."""
RANGE: Final = 1_000
RANGES: Final = 20
"""All below 32,768, the least pid_max of a machine (proc(5))."""
LAST_PID: Final = "/proc/sys/kernel/ns_last_pid"
SECONDS: Final = 5.0


def of(pid: int) -> list[int]:
    """The ids of all threads of ``pid``, as its berth sees them; none if it is gone."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(namespace_pid(int(thread)))
    return found


def free_range(epoch: int, taken: Iterable[int]) -> int:
    """The start of a range that has none of the ids ``taken``; another one for every epoch, if it can be had."""
    used = {(one - FIRST) // RANGE for one in taken}
    ranges = [(epoch + step) % RANGES for step in range(RANGES)]
    return FIRST + RANGE * next((one for one in ranges if one not in used), ranges[0])


async def continue_at(init_pid: int, number: int) -> None:
    """The berth's next process gets an id above ``number``. Raises FerryError ``machine_unfit``."""
    # The number is that of the writer's own PID namespace (pid_namespaces(7)), on the agent's own writable /proc.
    command = ["nsenter", "-t", str(init_pid), "-p", "--", "tee", LAST_PID]
    result = await asyncio.to_thread(attempt, command, timeout=SECONDS, stdin=str(number))
    if not result.ok:
        raise FerryError(
            "machine_unfit",
            f"The berth's next PID can't be set: {result.err.strip()}.",
            hint="The agent must be privileged: it writes kernel.ns_last_pid.",
        )
