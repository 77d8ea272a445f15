"""What a move cost, as the application sees it: last good data before, first good data after."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise, takewhile
from typing import Any, Final

import msgspec

from quicferry.quic.client import Connection
from quicferry.quic.follower import MAX_INTERRUPTION_MS
from quicferry.quic.migration import Migration, Outcome

KEPT: Final = 65_536
"""Instants of good data kept: how far back a measured pause can reach."""
MEASURED: Final = 1_024
"""Moves kept for :attr:`Meter.pauses`: a client may live for years, and the demo makes up to a thousand."""


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """One move's cost."""

    id: str
    outcome: Outcome
    target: str
    interruption_ms: float
    cwnd_before: int
    """Bytes, in force when the old server was last heard; from the connection's qlog."""
    cwnd_after: int
    """The smallest from there to a second after the target was heard: less than before if the move cost any."""

    def fields(self) -> dict[str, Any]:
        """For a JSON line."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields


class Meter:
    """Call :meth:`good` whenever the application has got what it waited for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._good: deque[float] = deque(maxlen=KEPT)
        self._measured: deque[tuple[Migration, float]] = deque(maxlen=MEASURED)

    def good(self) -> list[Pause]:
        """Note good data now. Returns the moves whose end it showed, each once; the server is told of them too."""
        self._good.append(time.monotonic())
        newest = self._measured[-1][0] if self._measured else None
        # They end in the order in which they began: only those after the last one measured can be new.
        later = list(takewhile(lambda one: one is not newest, reversed(self._connection.migrations)))
        new = []
        for migration in reversed(later):
            if migration.ended_at is None or migration.outcome == "replaced":
                continue
            interruption_ms = self._interruption(migration, migration.ended_at)
            self._measured.append((migration, interruption_ms))
            if migration.outcome == "arrived":
                self._connection.report_interruption(min(interruption_ms, MAX_INTERRUPTION_MS), migration)
            new.append(self._pause(migration, interruption_ms))
        return new

    @property
    def pauses(self) -> list[Pause]:
        """The moves measured so far, the last 1,024 of them, with what the trace says by now."""
        return [self._pause(migration, interruption_ms) for migration, interruption_ms in self._measured]

    def _interruption(self, migration: Migration, ended: float) -> float:
        """Milliseconds without good data around the target's first word; after a rollback the longest of the move."""
        gaps = [(before, after) for before, after in pairwise(self._good) if after >= migration.seen_at]
        if migration.outcome == "arrived":
            gaps = [(before, after) for before, after in gaps if before < ended <= after]
        return max((after - before for before, after in gaps), default=0.0) * 1000

    def _pause(self, migration: Migration, interruption_ms: float) -> Pause:
        before, after = self._connection.windows_around(migration)
        return Pause(
            id=migration.id,
            outcome=migration.outcome or "closed",
            target=migration.target_shown,
            interruption_ms=round(interruption_ms, 1),
            cwnd_before=before,
            cwnd_after=after,
        )
