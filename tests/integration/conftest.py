"""Fixtures over a real nats-server: connections, log, registry, a scripted node and a coordinator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from services.coordinator.lease import Tenure
from tests.conftest import NatsServer
from tests.integration.scripted import Node, coordinating

LONG_LEASE: Final = 10.0
"""Seconds: longer than a machine stands still, and short enough that a test outlasts a lead that nobody gave up."""


@pytest.fixture(autouse=True)
def long_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """For coordinators in this process: over a pause of 2 s theirs would run out, and rightly so."""
    monkeypatch.setattr("services.coordinator.leadership.LEASE", LONG_LEASE)
    monkeypatch.setattr("services.coordinator.leadership.Tenure", lambda: Tenure(LONG_LEASE))


@pytest_asyncio.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    async with Bus.connect("test", NatsSettings.load(nats_server.url), wait=True) as connected:
        yield connected


@pytest_asyncio.fixture
async def event_log(bus: Bus) -> EventLog:
    return await EventLog.open(bus)


@pytest_asyncio.fixture
async def registry(bus: Bus) -> Registry:
    return await Registry.open(bus)


@pytest_asyncio.fixture
async def node(bus: Bus, event_log: EventLog, registry: Registry) -> AsyncIterator[Node]:
    """Agents and a server that follow a script."""
    async with Node(bus, event_log, registry).serving() as serving:
        yield serving


@pytest_asyncio.fixture
async def coordinator(nats_server: NatsServer, node: Node) -> AsyncIterator[None]:
    """One coordinator, the real one."""
    del node  # first, so that berths are there
    async with coordinating(nats_server):
        yield
