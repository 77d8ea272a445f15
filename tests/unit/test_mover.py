"""Arming: what the server's next SIGTERM means, whatever comes late or twice."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest
import pytest_asyncio

from quicferry.protocol import handover
from quicferry.protocol.agents import ARE_YOU_THERE, ArmRequest
from quicferry.protocol.api import Address, Options
from quicferry.protocol.control import Ack
from quicferry.protocol.errors import FerryError
from quicferry.quic.move import Move
from quicferry.quic.mover import REMEMBERED, Mover

TARGET = Address(host="192.0.2.9", port=4242)


@pytest_asyncio.fixture
async def mover() -> AsyncIterator[Mover]:
    server = SimpleNamespace(udp=SimpleNamespace(port=os.getpid()))  # no real port, but a name that is ours alone
    made = Mover(server, None, migrate_to=None, on_quiesce=None, on_resume=None)  # type: ignore[arg-type]  # none moves
    yield made
    await made.stop()


def arm(migration: str) -> ArmRequest:
    return ArmRequest(id=migration, epoch=1, target=TARGET)


def disarm(migration: str) -> ArmRequest:
    return ArmRequest(id=migration, epoch=1)


def refused(mover: Mover, migration: str) -> bool:
    try:
        mover.arm(arm(migration))
    except FerryError as error:
        return error.code == "too_late"
    return False


@pytest.mark.parametrize("armed_before", [True, False])
async def test_an_arming_that_comes_after_its_disarming_is_refused(mover: Mover, armed_before: bool) -> None:
    if armed_before:
        mover.arm(arm("m1"))
    mover.arm(disarm("m1"))
    mover.arm(disarm("m1"))
    assert refused(mover, "m1")
    assert not mover.begin(), "the next SIGTERM would begin a move instead of stopping the server"
    assert not refused(mover, "m2")


async def test_disarming_one_leaves_another_armed(mover: Mover) -> None:
    mover.arm(arm("m2"))
    mover.arm(disarm("m1"))
    assert mover._armed == arm("m2")


async def test_what_is_remembered_has_a_bound(mover: Mover) -> None:
    for number in range(REMEMBERED + 1):
        mover.arm(disarm(f"m{number}"))
    assert [refused(mover, f"m{number}") for number in range(REMEMBERED + 1)] == [False] + [True] * REMEMBERED


async def test_asking_whether_it_is_there_changes_nothing(mover: Mover) -> None:
    mover.arm(disarm("m1"))
    mover.arm(arm("m2"))
    for _ in range(2 * REMEMBERED):
        mover.arm(ARE_YOU_THERE)
    assert mover._armed == arm("m2")
    assert list(mover._past) == ["m1"]


@contextlib.contextmanager
def waiting_agent() -> Iterator[None]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dock:
        dock.bind(handover.socket_name(os.getpid()))
        dock.listen(1)
        yield


async def test_a_sigterm_after_the_arming_ran_out_ends_nobody_while_the_agent_waits(mover: Mover) -> None:
    """The agent stood still between the dump's request and its SIGTERM, or the coordinator before that request."""
    mover.arm(arm("m1"))
    mover._lapse("m1")
    with waiting_agent():
        assert mover.begin()
        assert mover._move is None
    assert not mover.begin(), "with no agent there it is podman stop that asks"


async def test_a_sigterm_that_was_never_armed_stops_the_server_even_while_an_agent_prepares(mover: Mover) -> None:
    with waiting_agent():
        assert not mover.begin()
        mover.arm(arm("m1"))
        mover.arm(disarm("m1"))
        assert not mover.begin()


class Client:
    def __init__(self, name: str) -> None:
        self.name, self.quiesces = name, False

    def tell(self, line: bytes) -> bool:
        return True


def told(*clients: Client) -> Move:
    move = Move("m1", TARGET, 1, Options())
    for client in clients:
        move.tell(client)
    return move


async def test_of_a_connection_that_ended_no_past_move_keeps_anything(mover: Mover) -> None:
    left, other = Client("car"), Client("car")
    mover._past["m0"] = move = told(left)
    mover.gone(other)  # type: ignore[arg-type]
    assert move.told == {"car": left}
    mover.gone(left)  # type: ignore[arg-type]
    assert move.told == {}


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([], ""),
        (["no way", "not there"], "no way"),
        (["no way", ""], ""),
        (["no way", None], ""),
        (["outdated: epoch 1, the server is at 2", "no way"], ""),
    ],
)
async def test_an_address_that_every_client_refuses_is_wrong(answers: list[str | None], why: str) -> None:
    clients = [Client(f"car-{number}") for number in range(len(answers))]
    move = told(*clients)
    for client, answer in zip(clients, answers, strict=True):
        if answer is not None:
            move.ack(client, Ack(id="m1", refused=answer))
    assert move.refused_by_all == why
