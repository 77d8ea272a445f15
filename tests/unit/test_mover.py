"""Arming: what the server's next SIGTERM means, whatever comes late or twice."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from quicferry.protocol.agents import ARE_YOU_THERE, ArmRequest
from quicferry.protocol.api import Address
from quicferry.protocol.errors import FerryError
from quicferry.quic.mover import REMEMBERED, Mover

TARGET = Address(host="192.0.2.9", port=4242)


@pytest_asyncio.fixture
async def mover() -> AsyncIterator[Mover]:
    made = Mover(None, None, migrate_to=None, on_quiesce=None, on_resume=None)  # type: ignore[arg-type]  # none moves
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
