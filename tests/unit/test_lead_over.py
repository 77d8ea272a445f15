"""A lead that is over leaves nothing behind in the task that goes on."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from services.coordinator.driver import Driver
from services.coordinator.leadership import Leadership, LeadOverError
from services.coordinator.service import _lead


class Acts:
    """The leadership and the driver, of which the former ends."""

    name = "c1"

    def __init__(self) -> None:
        self.acting = asyncio.Event()
        self.calls: list[str] = []

    async def keep(self) -> None:
        await self.acting.wait()
        await asyncio.sleep(0)
        raise LeadOverError

    async def act(self, acting: asyncio.Event) -> None:
        acting.set()
        self.acting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.calls.append("ended")

    async def give_up(self) -> None:
        self.calls.append("given up")


async def test_a_timeout_after_a_lead_that_is_over_is_a_timeout() -> None:
    """Python 3.11's TaskGroup leaves its task's count of cancellations raised, which 3.11.2 takes for one."""
    both = Acts()
    await _lead(cast(Leadership, both), cast(Driver, both), asyncio.Event(), "nats")
    assert both.calls == ["ended", "given up"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.Event().wait()


async def test_cancelled_it_waits_until_nothing_is_under_way() -> None:
    both = Acts()
    ready = asyncio.Event()

    async def keep() -> None:
        await asyncio.Event().wait()

    both.keep = keep  # type: ignore[method-assign]
    lead = asyncio.create_task(_lead(cast(Leadership, both), cast(Driver, both), ready, "nats"))
    await ready.wait()
    lead.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lead
    assert both.calls == ["ended", "given up"]
