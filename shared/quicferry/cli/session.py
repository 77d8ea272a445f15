"""What every command that talks to NATS shares: connecting, asking, and hints that fit somebody at a shell."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from quicferry.cli.logfile import Entry
from quicferry.protocol import subjects
from quicferry.protocol.agents import ARE_YOU_THERE, ArmReply
from quicferry.protocol.api import Placement, ServicesReply, ServicesRequest
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.bus.connection import Bus

ANSWER_SECONDS: Final = 6.0
"""How long an answer may take, all tries together: enough for a coordinator that was killed to be started again and
for its lease to run out, or for another one to take over."""
TRY_SECONDS: Final = 2.5
"""A request unanswered for so long may have been a dead coordinator's, and is sent again."""
TRY_WAIT: Final = 0.2
ARM_SECONDS: Final = 5.0
"""How long a server wrapper may take to answer."""
FRESH_MS: Final = 10_000
"""A berth seen longer ago is not counted on, by the coordinator neither."""
READ_SECONDS: Final = 30.0
"""How long reading one migration's whole log may take."""

R = TypeVar("R")


@contextlib.asynccontextmanager
async def connected(args: argparse.Namespace) -> AsyncIterator[Bus]:
    """The connection that --nats, --context and the environment ask for; fails within 2 s, never waits."""
    from quicferry.bus.connection import Bus
    from quicferry.bus.settings import DEFAULT_URL, NatsSettings

    settings = NatsSettings.load(url=args.nats, context=args.context)
    try:
        async with Bus.connect("quicferry-cli", settings, wait=False) as bus:
            yield bus
    except FerryError as error:
        if error.code == "nats_unreachable" and settings.servers == [DEFAULT_URL]:
            error.hint = "`quicferry up` starts one here; --nats, --context and NATS_URL name another."
        raise


async def ask(bus: Bus, subject: str, request: msgspec.Struct, reply: type[R]) -> R:
    """Ask the coordinator that leads. Raises the FerryError that it answers, or ``no_answer`` with what to look at.

    Asked again while none leads, so ``request`` must do no harm twice: a MigrateRequest has its id.
    """
    import asyncio

    now = asyncio.get_running_loop().time
    end = now() + ANSWER_SECONDS
    while True:
        try:
            return await bus.request(subject, request, reply, timeout=min(TRY_SECONDS, end - now()))
        except FerryError as error:
            if error.code not in ("no_answer", "not_leading") or now() + TRY_WAIT >= end:
                if error.code == "no_answer" and not error.hint:
                    error.hint = (
                        "Is a coordinator running? `quicferry up` starts it, `quicferry doctor` looks around."
                    )
                raise
        await asyncio.sleep(TRY_WAIT)


async def services(bus: Bus) -> ServicesReply:
    """Where every service is, and every berth."""
    return await ask(bus, subjects.SERVICES, ServicesRequest(), ServicesReply)


def reported(reply: ServicesReply, *, since_ms: int = 0) -> list[Placement]:
    """The services whose berth an agent has seen since then (Unix time); by default in the hour that berths are kept.

    The log goes on to know a service that is gone for good, for as long as it has its last move.
    """
    seen = {(one.service, one.node, one.berth) for one in reply.berths if one.seen_ms >= since_ms}
    return [one for one in reply.services if (one.service, one.place.node, one.place.berth) in seen]


def present(reply: ServicesReply) -> list[Placement]:
    """The services whose berth an agent sees now."""
    return reported(reply, since_ms=time.time_ns() // 1_000_000 - FRESH_MS)


async def the_service(bus: Bus, name: str | None) -> Placement:
    """The placement of the service ``name``, or of the only one when None.

    Raises FerryError ``unknown_service`` when there is none, ``usage`` when there are several to choose from.
    """
    reply = await services(bus)
    known = reply.services
    if name is None:  # if no agent reports anything, what is known has to do
        known = present(reply) or reported(reply) or known
    if name is None and len(known) == 1:
        return known[0]
    names = ", ".join(sorted(placement.service for placement in known))
    if name is None and known:
        raise FerryError("usage", "There are several services; say which.", hint=f"One of: {names}.")
    for placement in known:
        if placement.service == name:
            return placement
    what = f"There is no service {name!r}." if name else "No service is running."
    hint = f"There is: {names}." if known else "`quicferry up` starts one; it takes a moment to be seen."
    raise FerryError("unknown_service", what, hint=hint)


async def heralds(bus: Bus, service: str) -> bool:
    """Whether the service's wrapper answers: the server serves, and a move could begin. Changes nothing."""
    try:
        await bus.request(subjects.arm(service), ARE_YOU_THERE, ArmReply, timeout=ARM_SECONDS)
    except FerryError as error:
        if error.code != "no_answer":
            raise
        return False
    return True


async def read_log(args: argparse.Namespace, migration: str) -> list[Entry]:
    """One migration's whole log from NATS. Raises FerryError ``unknown_migration`` when there is none."""
    import asyncio

    from quicferry.bus.log import EventLog

    try:
        async with asyncio.timeout(READ_SECONDS), connected(args) as bus:
            log = await EventLog.open(bus)
            entries = [Entry(entry.seq, entry.event) for entry in await log.read(migration)]
    except TimeoutError:
        raise FerryError("no_answer", f"The log was not read within {READ_SECONDS:g} s.") from None
    if not entries:
        raise FerryError(
            "unknown_migration", f"The log knows no migration {migration!r}.", hint="`quicferry status` lists them."
        )
    return entries
