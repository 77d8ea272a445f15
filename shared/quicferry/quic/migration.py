"""One move as the client's application sees it."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from quicferry.protocol.api import Address

Outcome = Literal["arrived", "rolled_back", "replaced", "closed"]
"""``arrived``: the target has spoken. ``rolled_back``: the server stayed. ``replaced``: another move took
this one's place before it ended. ``closed``: the connection ended first."""


class Migration:
    """A move this client has heard of and goes along with."""

    def __init__(self, migration: str, target: Address, epoch: int) -> None:
        self.id = migration
        self.target = target
        self.epoch = epoch
        self.seen_at = time.monotonic()
        """When ``migrate`` was heard, monotonic seconds."""
        self.ended_at: float | None = None
        """When the move had its outcome, monotonic seconds."""
        self.last_before: float = 0.0
        """When the old server was last heard, Unix seconds; 0 until the move has ended."""
        self.first_after: float = 0.0
        """When the target was first heard, Unix seconds; 0 unless it arrived."""
        self.interruption_ms: float | None = None
        """From the old server's last fresh packet to the target's first; idle time counts as well."""
        self.outcome: Outcome | None = None
        self._ended = asyncio.Event()

    @property
    def target_shown(self) -> str:
        """The target's address for a person."""
        host = self.target.host
        return f"[{host}]:{self.target.port}" if ":" in host else f"{host}:{self.target.port}"

    async def arrived(self, timeout: float | None = None) -> Outcome:
        """Wait for the move's end and say which. Raises TimeoutError after ``timeout`` seconds."""
        async with asyncio.timeout(timeout):
            await self._ended.wait()
        assert self.outcome is not None  # noqa: S101 - end() sets it first
        return self.outcome

    def end(self, outcome: Outcome) -> None:
        """For the wrapper: the move is over."""
        if self.outcome is None:
            self.outcome = outcome
            self.ended_at = time.monotonic()
            self._ended.set()
