"""What must hold after whatever was made to fail. Every check returns what is wrong, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import Final

from quicferry.host import processes
from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from quicferry.protocol.errors import FerryError
from tests.e2e.berths import PORT
from tests.e2e.moving import Datagram
from tests.faults.world import World

TIDY_SECONDS: Final = 30.0
"""For what is cleared up behind a migration's end."""
LOOK: Final = 0.05


def outcome(events: list[ev.AnyEvent]) -> str:
    """The migration's outcome and, if it has one, its reason's code."""
    for event in events:  # what was seen may come later
        if isinstance(event, ev.RolledBack | ev.Failed):
            return f"{ev.kind(event).partition('.')[2]}: {event.reason.code}"
        if isinstance(event, ev.Completed):
            return "completed"
    return "none"


def log_is_sound(events: list[ev.AnyEvent]) -> list[str]:
    """The log ends once, forward only after the commit, with a reason if back, and says what the machine says."""
    wrong: list[str] = []
    kinds = [ev.kind(event).partition(".")[2] for event in events if isinstance(event, ev.Decision)]
    ends = [kind for kind in kinds if kind in ("completed", "rolled_back", "failed")]
    if len(ends) != 1 or kinds[-1:] != ends:
        wrong.append(f"decisions {kinds}")
    if "committed" in kinds and "rolled_back" in kinds:
        wrong.append("rolled back after the commit")
    if "completed" in kinds and "committed" not in kinds:
        wrong.append("completed without a commit")
    wrong += [f"replay differs: {step.differs}" for step in replay(events) if step.differs]
    if any(isinstance(event, ev.RolledBack | ev.Failed) and not event.reason.message for event in events):
        wrong.append("a reason without words")
    return wrong


def one_copy_sent(seen: Sequence[Datagram], source: str, *, moved: bool) -> list[str]:
    """On the wire: the source sends until the target does, if that ever does, and not a datagram after."""
    senders = [datagram.source for datagram in seen if datagram.source_port == PORT]
    copies = [ip for ip, _ in itertools.groupby(senders)]
    if copies[:1] not in ([], [source]) or len(copies) > 1 + moved:
        return [f"datagrams came from {', then '.join(copies)}"]
    return []


async def tidy(
    world: World, service: str, *, server: bool = True, ids: str = "", patience: float = TIDY_SECONDS
) -> list[str]:
    """Until nothing of a migration is left, for a while; what is left then.

    Only images and locks of migrations whose ids begin with ``ids`` count: others may be under way.
    """
    end = asyncio.get_running_loop().time() + patience
    while True:
        wrong = await _left(world, service, server=server, ids=ids)
        if not wrong or asyncio.get_running_loop().time() > end:
            return wrong
        await asyncio.sleep(LOOK)


def _nice(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


async def _left(world: World, service: str, *, server: bool, ids: str) -> list[str]:
    wrong: list[str] = []
    serving = 0
    for berth in world.of(service):
        if not world.lives(berth):
            wrong.append(f"berth {berth.name} is gone")
            continue
        try:
            wrong += [f"{berth.name}: process {command}" for command in berth.commands()]
            pid = berth.server_pid
            if pid and processes.is_held(pid):
                wrong.append(f"{berth.name}: a server that stands still")
            elif pid:
                serving += 1
            if pid and _nice(pid) != _nice(berth.init_pid):
                wrong.append(f"{berth.name}: its server has the priority of one that clients wait for")
            if (ports := berth.udp_ports()) != bool(pid):
                wrong.append(f"{berth.name}: {ports} UDP sockets on the service's port")
            if berth.listeners():
                wrong.append(f"{berth.name}: a listener for hand-overs")
            wrong += [f"{berth.name}: its {what} changed" for what in berth.changed()]
        except OSError as error:  # it ended while we looked
            wrong.append(f"{berth.name}: {error}")
    if serving != server:
        wrong.append(f"{serving} servers serve")
    with contextlib.suppress(FileNotFoundError):
        wrong += [f"image directory {name}" for name in os.listdir(world.images) if name.startswith(ids)]
    try:
        wrong += [f"lock of {lock.id}" for lock in await world.registry.locks() if lock.id.startswith(ids)]
    except FerryError as error:
        wrong.append(f"the locks can't be read: {error.code}")
    return wrong
