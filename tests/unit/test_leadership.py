"""A coordinator that is told to stop stops, even if NATS answers at that moment; and no two have the same name."""

from __future__ import annotations

import asyncio
import re

import pytest

from services.coordinator.leadership import _heeding_cancellation, make_name


async def swallows() -> str:
    """As Python 3.11's wait_for does when the answer is there already; no test can bring that moment about."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return "an answer"
    raise AssertionError("unreachable")


async def exchange() -> str:
    with _heeding_cancellation():
        return await swallows()


async def test_a_lost_cancellation_is_heeded() -> None:
    task = asyncio.create_task(exchange())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_of_before_is_not() -> None:
    """3.11's TaskGroup leaves the count raised in whoever had one with a failed task."""

    async def again() -> str:
        await swallows()
        with _heeding_cancellation():
            await asyncio.sleep(0)
        return "went on"

    task = asyncio.create_task(again())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "went on"


def test_names_fit_a_queue_group_and_differ() -> None:
    names = {make_name() for _ in range(10)}
    assert len(names) == 10
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names)
