"""Endpoints: what any NATS client may send, and what it gets back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from quicferry.bus.connection import Bus
from quicferry.bus.endpoints import Endpoint, serve
from quicferry.protocol.errors import FerryError

BAD_MESSAGES = [
    pytest.param(b"", id="empty"),
    pytest.param(b"\x00\xff\xfe\x80", id="binary"),
    pytest.param(b'{"number": 1', id="truncated"),
    pytest.param(b"[" * 100_000, id="deep"),
    pytest.param(b"[]", id="array"),
    pytest.param(b"null", id="null"),
    pytest.param(b'{"number": "one"}', id="type"),
    pytest.param(b'{"number": 1e400}', id="range"),
    pytest.param(b"{}", id="missing"),
    pytest.param(b'{"number": ' + b"1" * 300_000 + b"}", id="huge"),
    pytest.param(b'{"number": 1, "text": "\xed\xa0\x80"}', id="surrogate"),
]


class Ask(msgspec.Struct, kw_only=True):
    number: int
    text: str = ""


class Tell(msgspec.Struct, kw_only=True):
    number: int


handled: list[int] = []
published = asyncio.Event()


async def double(ask: Ask) -> Tell:
    if ask.number == 13:
        raise FerryError("no_target", "Line one.\nLine two, ünicode.", hint="Try 12.", path="$.number")
    if ask.number == 14:
        raise RuntimeError("secret insides")
    if ask.number == 15:
        published.set()
    return Tell(number=ask.number * 2)


@pytest_asyncio.fixture
async def served(bus: Bus) -> AsyncIterator[Bus]:
    endpoint = Endpoint("double", "test.double", Ask, double)
    async with serve(bus, name="test-service", description="doubles", endpoints=[endpoint]):
        yield bus


async def ask(bus: Bus, number: int) -> int:
    return (await bus.request("test.double", Ask(number=number), Tell, timeout=5)).number


async def test_request_and_reply(served: Bus) -> None:
    assert await ask(served, 21) == 42


async def test_our_errors_travel_whole(served: Bus) -> None:
    with pytest.raises(FerryError) as caught:
        await ask(served, 13)
    assert caught.value.body().code == "no_target"
    assert caught.value.message == "Line one.\nLine two, ünicode."
    assert caught.value.hint == "Try 12."
    assert caught.value.path == "$.number"


async def test_any_client_can_read_an_error(served: Bus) -> None:
    answer = await served.nats.request("test.double", b'{"number": "x"}', timeout=5)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == "bad_request"
    assert answer.headers["Nats-Service-Error"]
    error = json.loads(answer.data)["error"]
    assert error["code"] == "bad_request"
    assert error["path"] == "$.number"
    assert error["message"] == "Expected `int`, got `str`."


async def test_a_defect_does_not_leak(served: Bus) -> None:
    answer = await served.nats.request("test.double", b'{"number": 14}', timeout=5)
    assert json.loads(answer.data)["error"]["code"] == "internal"
    assert b"secret" not in answer.data
    assert "secret" not in str(answer.headers)
    assert await ask(served, 1) == 2


@pytest.mark.parametrize("payload", BAD_MESSAGES)
async def test_bad_messages_get_an_error_and_do_no_harm(served: Bus, payload: bytes) -> None:
    answer = await served.nats.request("test.double", payload, timeout=5)
    error = json.loads(answer.data)["error"]
    assert error["code"] == "bad_request"
    assert len(error["message"]) > 10
    await served.nats.publish("test.double", payload)  # with nobody to answer
    assert await ask(served, 1) == 2


async def test_a_plain_publish_is_handled(served: Bus) -> None:
    published.clear()
    await served.publish("test.double", Ask(number=15))
    async with asyncio.timeout(5):
        await published.wait()
    await served.publish("test.double", Ask(number=13))
    await served.publish("test.double", Ask(number=14))
    assert await ask(served, 1) == 2


async def test_it_is_a_micro_service(served: Bus) -> None:
    await ask(served, 1)
    with contextlib.suppress(FerryError):
        await ask(served, 13)
    info = json.loads((await served.nats.request("$SRV.INFO.test-service", b"", timeout=5)).data)
    assert info["description"] == "doubles"
    assert [endpoint["subject"] for endpoint in info["endpoints"]] == ["test.double"]
    stats = json.loads((await served.nats.request("$SRV.STATS.test-service", b"", timeout=5)).data)
    assert stats["endpoints"][0]["num_requests"] == 2
    assert stats["endpoints"][0]["data"] == {"refused": 1}


async def test_after_the_context_nobody_listens(bus: Bus) -> None:
    endpoint = Endpoint("double", "test.double", Ask, double)
    async with serve(bus, name="test-service", description="doubles", endpoints=[endpoint]):
        assert await ask(bus, 1) == 2
    with pytest.raises(FerryError) as caught:
        await ask(bus, 1)
    assert caught.value.code == "no_answer"


async def test_a_foreign_responder_is_understood(bus: Bus) -> None:
    subscription = await bus.nats.subscribe("test.double")

    async def answer(headers: dict[str, str] | None, body: bytes) -> None:
        message = await subscription.next_msg(timeout=5)
        await bus.nats.publish(message.reply, body, headers=headers)

    async with asyncio.TaskGroup() as group:
        group.create_task(answer({"Nats-Service-Error-Code": "500", "Nats-Service-Error": "no"}, b""))
        with pytest.raises(FerryError, match=r"no \(500\)"):
            await ask(bus, 1)
        group.create_task(answer(None, b"nonsense"))
        with pytest.raises(FerryError, match="not of its form"):
            await ask(bus, 1)
