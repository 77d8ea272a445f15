"""The record of who leads, in a real bucket."""

from __future__ import annotations

import asyncio

import pytest

from quicferry.bus.connection import Bus
from quicferry.bus.lead import LONGEST_LEASE_MS, Claim, Held, LeadLock
from quicferry.protocol import subjects
from quicferry.protocol.errors import FerryError
from tests.conftest import NatsServer


def claim(holder: str, renewal: int = 1) -> Claim:
    return Claim(holder=holder, lease_ms=2500, since_ms=1, renewal=renewal)


async def test_one_of_many_takes_it(bus: Bus) -> None:
    lock = await LeadLock.open(bus)
    assert await lock.read() == Held(None, 0)
    got = await asyncio.gather(*(lock.write(claim(f"c{n}"), 0) for n in range(10)), return_exceptions=True)
    (won,) = [n for n, revision in enumerate(got) if isinstance(revision, int)]
    assert {error.code for error in got if isinstance(error, FerryError)} == {"log_conflict"}
    assert await lock.read() == Held(claim(f"c{won}"), got[won])


async def test_only_the_newest_revision_renews(bus: Bus) -> None:
    lock = await LeadLock.open(bus)
    first = await lock.write(claim("one"), 0)
    second = await lock.write(claim("one", 2), first)
    assert second > first
    for stale in (first, 0):
        with pytest.raises(FerryError) as caught:
            await lock.write(claim("two"), stale)
        assert caught.value.code == "log_conflict"
    assert await lock.read() == Held(claim("one", 2), second)


async def test_a_deleted_record_can_be_written_again(bus: Bus) -> None:
    lock = await LeadLock.open(bus)
    revision = await lock.write(claim("one"), 0)
    await (await bus.js.key_value(subjects.LEAD_BUCKET)).delete(subjects.LEAD_KEY)
    assert await lock.read() == Held(None, 0)
    with pytest.raises(FerryError):
        await lock.write(claim("one", 2), revision)
    assert await lock.write(claim("two"), 0) > revision


async def test_it_outlives_a_restart_of_the_server(bus: Bus, nats_server: NatsServer) -> None:
    """Else a standby would find it free while the leader still counts on it."""
    lock = await LeadLock.open(bus)
    revision = await lock.write(claim("one"), 0)
    await nats_server.restart()
    await bus.ready()
    lock = await LeadLock.open(bus)  # waits for JetStream
    assert await lock.read() == Held(claim("one"), revision)


@pytest.mark.parametrize("value", [b"", b"garbage", b'{"holder":1}', b'{"holder":"x","lease_ms":3600000}'])
async def test_a_record_of_no_form_is_somebodys(bus: Bus, value: bytes) -> None:
    lock = await LeadLock.open(bus)
    await (await bus.js.key_value(subjects.LEAD_BUCKET)).put(subjects.LEAD_KEY, value)
    held = await lock.read()
    assert held.claim is not None
    assert held.claim.holder
    assert 0 < held.claim.lease_ms <= LONGEST_LEASE_MS
    await lock.write(claim("one"), held.revision)


async def test_a_bucket_that_is_gone_is_made_anew(bus: Bus) -> None:
    lock = await LeadLock.open(bus)
    await bus.js.delete_key_value(subjects.LEAD_BUCKET)
    with pytest.raises(FerryError):
        await lock.write(claim("one"), 0)
    await lock.make()
    assert await lock.write(claim("one"), 0) > 0
