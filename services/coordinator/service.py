"""The coordinator put together: log, registry, driver and the four endpoints of the public API."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from quicferry.bus.connection import Bus
from quicferry.bus.endpoints import Endpoint, serve
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import subjects
from quicferry.protocol.api import CancelRequest, MigrateRequest, ServicesRequest, StatusRequest
from services.coordinator.book import Book
from services.coordinator.driver import Driver
from services.coordinator.intake import Intake

log = structlog.get_logger()

NAME: Final = "quicferry-coordinator"


async def coordinate(settings: NatsSettings, ready: asyncio.Event | None = None) -> None:
    """Run a coordinator until cancelled; ``ready`` is set once it answers.

    Any number may run at once: the log decides between them.
    """
    async with Bus.connect(NAME, settings, wait=True) as bus:
        event_log, registry, book = await EventLog.open(bus), await Registry.open(bus), Book()
        driver, intake = Driver(bus, event_log, registry, book), Intake(event_log, registry, book)
        endpoints = [
            Endpoint("migrate", subjects.MIGRATE, MigrateRequest, intake.migrate),
            Endpoint("cancel", subjects.CANCEL, CancelRequest, intake.cancel),
            Endpoint("status", subjects.STATUS, StatusRequest, intake.status),
            Endpoint("services", subjects.SERVICES, ServicesRequest, intake.services),
        ]
        async with asyncio.TaskGroup() as group:
            group.create_task(driver.run())
            await driver.ready.wait()
            async with serve(
                bus,
                name=NAME,
                description="Moves running QUIC servers between berths",
                endpoints=endpoints,
                queue_group=NAME,
            ):
                log.info("ready", service=NAME, nats=settings.shown)
                if ready is not None:
                    ready.set()
                await asyncio.Event().wait()
