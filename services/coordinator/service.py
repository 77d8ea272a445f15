"""The coordinator put together: log, registry, driver, the lead, and the four endpoints of the public API."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from quicferry.bus.connection import Bus
from quicferry.bus.endpoints import Endpoint, serve
from quicferry.bus.lead import LeadLock
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import subjects
from quicferry.protocol.api import CancelRequest, MigrateRequest, ServicesRequest, StatusRequest
from services.coordinator.book import Book
from services.coordinator.driver import Driver
from services.coordinator.follower import Follower
from services.coordinator.intake import Intake
from services.coordinator.leadership import Leadership, LeadOverError, make_name

log = structlog.get_logger()

NAME: Final = "quicferry-coordinator"


async def coordinate(settings: NatsSettings, ready: asyncio.Event | None = None) -> None:
    """Run a coordinator until cancelled; ``ready`` is set once it answers, or stands by for one that does.

    Any number may run at once: one leads, the others stand by, and the log decides even if two should act.
    """
    async with Bus.connect(NAME, settings, wait=True) as bus:
        leadership = Leadership(await LeadLock.open(bus), make_name())
        event_log = await EventLog.open(bus, permit=leadership.check)
        registry, book = await Registry.open(bus), Book()
        follower = Follower(event_log, book)
        driver = Driver(bus, event_log, registry, book, follower, leadership.check)
        intake = Intake(event_log, registry, book, leadership.name)
        ready = ready or asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(follower.run())
            group.create_task(_when(leadership.standing_by, ready))
            await follower.ready.wait()
            while True:
                await leadership.win()
                # No group in common: in one, a coordinator that has just lost the lead without knowing it would get
                # requests that are the new leader's.
                async with serve(
                    bus,
                    name=NAME,
                    description="Moves running QUIC servers between berths",
                    endpoints=_endpoints(intake),
                    queue_group=leadership.name,
                    metadata={"leader": leadership.name},
                    answering=lambda: leadership.leads,
                ):
                    # Nobody is told to leave for a lease that ran out while NATS was away: it is ours still, mostly.
                    while True:
                        await _lead(leadership, driver, ready, settings.shown)
                        if not await leadership.regain():
                            break


def _endpoints(intake: Intake) -> list[Endpoint]:
    return [
        Endpoint("migrate", subjects.MIGRATE, MigrateRequest, intake.migrate),
        Endpoint("cancel", subjects.CANCEL, CancelRequest, intake.cancel),
        Endpoint("status", subjects.STATUS, StatusRequest, intake.status),
        Endpoint("services", subjects.SERVICES, ServicesRequest, intake.services),
    ]


async def _lead(leadership: Leadership, driver: Driver, ready: asyncio.Event, shown: str) -> None:
    """Act until the lead is over. When it is, or when cancelled, nothing is under way any more."""
    # In a task of its own: Python 3.11's TaskGroup leaves the count of cancellations raised when one of its tasks
    # has failed, and up to 3.11.3, Debian 12's, every timeout that passes in such a task is a cancellation.
    await asyncio.create_task(_act(leadership, driver, ready, shown), name="lead")


async def _act(leadership: Leadership, driver: Driver, ready: asyncio.Event, shown: str) -> None:
    acting = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(leadership.keep())
            group.create_task(driver.act(acting))
            await acting.wait()
            log.info("ready", service=NAME, nats=shown, name=leadership.name)
            ready.set()
    except* LeadOverError:
        pass
    finally:
        await leadership.give_up()  # does nothing when it is over anyway


async def _when(one: asyncio.Event, other: asyncio.Event) -> None:
    await one.wait()
    other.set()
