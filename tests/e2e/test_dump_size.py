"""What a move of the echo server carries: counts, which no machine's speed changes (docs/performance-memory.md)."""

from __future__ import annotations

from typing import Final

import pytest

from quicferry.host.compose import Stack
from quicferry.protocol import events as ev
from tests.e2e.moving import System

MOST_PAGES: Final = 7_300
"""5,822 when a fresh server was measured, about 6,750 after the moves of the tests before this one."""
MOST_IMAGE_BYTES: Final = 29_900_000
"""23.9 MB and 27.7, likewise."""


@pytest.fixture
def system(stack: Stack, stack_variables: dict[str, str]) -> System:
    return System(stack, stack_variables)


async def test_a_server_with_one_client_is_no_larger_than_it_was(system: System) -> None:
    async with system.client("sized", interval=0.005) as client:
        await client.echoes(50)
        told, events = await system.move()
        await client.echoes(1)
    assert told.outcome == "completed"
    (dumped,) = [event for event in events if isinstance(event, ev.Dumped)]
    assert dumped.pages <= MOST_PAGES
    assert dumped.image_bytes <= MOST_IMAGE_BYTES
