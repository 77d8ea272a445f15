"""Fixtures over a real nats-server: connections, the log and the registry."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from tests.conftest import NatsServer


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
