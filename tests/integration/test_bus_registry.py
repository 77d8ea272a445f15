"""Berths, placements and locks in their buckets."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace
from nats.js.errors import NoKeysError
from nats.js.kv import KeyValue

from quicferry.bus.connection import Bus
from quicferry.bus.registry import Lock, Registry, now_ms
from quicferry.protocol import subjects
from quicferry.protocol.api import Address, Berth, Place, Placement
from quicferry.protocol.errors import FerryError

WAIT = 10.0


def berth(name: str, *, occupied: bool = False, seen_ms: int = 1) -> Berth:
    return Berth(
        node="local",
        berth=name,
        service="echo",
        address=Address(host="127.0.0.1", port=14242),
        port=4242,
        occupied=occupied,
        container="c0ffee",
        image="sha256:1",
        seen_ms=seen_ms,
    )


def placed(name: str, epoch: int) -> Placement:
    return Placement(
        service="echo",
        place=Place(node="local", berth=name, address=Address(host="127.0.0.1", port=14242)),
        epoch=epoch,
    )


async def undated(registry: Registry) -> list[Berth]:
    return [replace(found, seen_ms=1) for found in await registry.berths()]


async def test_berths_newest_report_only(registry: Registry) -> None:
    assert await undated(registry) == []
    await registry.put_berth(berth("b"))
    await registry.put_berth(berth("a"))
    await registry.put_berth(berth("b", occupied=True))
    assert await undated(registry) == [berth("a"), berth("b", occupied=True)]


@pytest.mark.parametrize("skew_ms", [-3_600_000, 0, 3_600_000])
async def test_a_sighting_is_as_old_as_it_is_whatever_the_clock_of_its_host(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, skew_ms: int
) -> None:
    monkeypatch.setattr("quicferry.bus.registry.now_ms", lambda: now_ms() + skew_ms)
    await registry.put_berth(berth("a", seen_ms=now_ms() + skew_ms - 600_000))
    await registry.put_berth(berth("b", seen_ms=now_ms() + skew_ms))
    (a, b), now = await registry.sighted()
    assert 600_000 <= now - a.seen_ms < 660_000
    assert now - b.seen_ms < 60_000


async def test_an_unreadable_berth_hides_no_other(bus: Bus, registry: Registry) -> None:
    kv = await bus.js.key_value(subjects.BERTH_BUCKET)
    await kv.put("local.bad", b"\xff")
    await registry.put_berth(berth("a"))
    await kv.put("local.gone", b"{}")
    await kv.delete("local.gone")
    assert await undated(registry) == [berth("a")]


async def test_placement_is_compare_and_set(registry: Registry) -> None:
    assert await registry.placement("echo") == (None, 0)
    revision = await registry.place(placed("a", 1), 0)
    assert await registry.placement("echo") == (placed("a", 1), revision)
    with pytest.raises(FerryError) as caught:
        await registry.place(placed("b", 2), 0)
    assert caught.value.code == "log_conflict"
    newer = await registry.place(placed("b", 2), revision)
    assert newer > revision
    assert await registry.placements() == [placed("b", 2)]


async def test_one_of_many_gets_the_lock(registry: Registry) -> None:
    got = await asyncio.gather(*(registry.lock("echo", f"m{n}") for n in range(10)))
    assert got.count(True) == 1
    holder = await registry.lock_holder("echo")
    assert holder is not None
    assert holder.id == f"m{got.index(True)}"
    assert await registry.lock("echo", holder.id)  # again, by the same migration
    await registry.unlock("echo", "another")
    assert await registry.lock_holder("echo") == holder
    await registry.unlock("echo", holder.id)
    assert await registry.lock_holder("echo") is None
    assert await registry.lock("echo", "next")
    assert await registry.lock("other", "m1")


async def test_a_lock_that_changed_hands_is_left_alone(
    bus: Bus, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await registry.lock("echo", "m1")
    read = Registry._lock

    async def read_and_overtaken(found: Registry, service: str) -> tuple[Lock | None, int]:
        held = await read(found, service)
        await (await bus.js.key_value(subjects.LOCK_BUCKET)).put(service, b'{"id":"m2","at_ms":1}')
        return held

    monkeypatch.setattr(Registry, "_lock", read_and_overtaken)
    await registry.unlock("echo", "m1")
    monkeypatch.undo()
    assert await registry.lock_holder("echo") == Lock(id="m2", at_ms=1)


async def test_what_jetstream_refuses_is_told_as_such(bus: Bus, registry: Registry) -> None:
    """A full account, a sealed stream: it may pass, and an agent or a coordinator must outlive it."""
    assert await registry.lock("echo", "m1")
    revision = await registry.place(placed("a", 1), 0)
    await registry.put_berth(berth("a"))
    for bucket in (subjects.BERTH_BUCKET, subjects.PLACEMENT_BUCKET, subjects.LOCK_BUCKET):
        info = await bus.js.stream_info(f"KV_{bucket}")
        info.config.sealed = True
        await bus.js.update_stream(info.config)
    for attempt in (
        registry.put_berth(berth("b")),
        registry.place(placed("b", 2), revision),
        registry.lock("other", "m2"),
        registry.unlock("echo", "m1"),
        registry.forget("echo"),
    ):
        with pytest.raises(FerryError) as caught:
            await attempt
        assert caught.value.code == "nats_unreachable"
        assert "sealed" in caught.value.message
        assert caught.value.hint
    for name in (subjects.PLACEMENT_BUCKET, subjects.LOCK_BUCKET):
        await bus.js.delete_stream(f"KV_{name}")
    for reading in (registry.placement("echo"), registry.lock_holder("echo")):
        with pytest.raises(FerryError) as caught:
            await reading
        assert caught.value.code in ("nats_unreachable", "no_answer")


async def _keys(kv: KeyValue) -> list[str]:
    try:
        return await kv.keys()
    except NoKeysError:
        return []


async def test_the_buckets_are_plain_ones(bus: Bus, registry: Registry) -> None:
    """Any NATS client reads them: here nats.py's own, with its own idea of a bucket."""
    await registry.put_berth(berth("a"))
    kv = await bus.js.key_value(subjects.BERTH_BUCKET)
    async with asyncio.timeout(WAIT):
        while not (found := await _keys(kv)):
            pass  # nats.py ends too soon when the key is on its way as it asks how many are pending
    assert found == ["local.a"]
    with pytest.raises(NoKeysError):
        await (await bus.js.key_value(subjects.PLACEMENT_BUCKET)).keys()
    assert (await bus.js.create_key_value(bucket="another")) is not None
    await Registry.open(bus)
