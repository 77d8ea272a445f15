"""Until when a coordinator may act, and when another may take over: each reckons on its own clock alone. No I/O.

A renewal is asked for at ``a``, on the leader's clock, and seen at ``s`` by a standby, on the standby's. The record
was written in between, so ``a`` is not later than ``s``. The leader stops at ``a + LEASE - MARGIN``, the standby
waits until ``s + LEASE``: it comes later by MARGIN at least, however wrong either clock is set. Only their rates
must agree, to within MARGIN / LEASE.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

LEASE: Final = 2.5
"""Seconds for which a renewal counts."""
MARGIN: Final = 0.5
"""Seconds by which the leader stops before the lease is over for others."""
RENEW: Final = 0.6
"""Seconds between two renewals: two may be lost before the third is too late."""


class Tenure:
    """The leader's side. Times are seconds on one clock that never goes back, and runs while we do not."""

    def __init__(self, lease: float = LEASE, margin: float = MARGIN) -> None:
        self._span = lease - margin
        self._until = -math.inf

    def renewed(self, asked_at: float) -> None:
        """A renewal that was sent at ``asked_at`` is in the record."""
        self._until = max(self._until, asked_at + self._span)

    def over(self) -> None:
        """Given up, or taken away."""
        self._until = -math.inf

    def left(self, now: float) -> float:
        """Seconds during which it may still act; 0 when it may not."""
        return max(0.0, self._until - now)


class Seen(NamedTuple):
    """What tells one state of the record from another."""

    holder: str
    revision: int
    renewal: int
    lease: float
    """Seconds, as its holder promises."""


class Vigil:
    """The standby's side: how long the record has stayed as it is."""

    def __init__(self) -> None:
        self._seen: Seen | None = None
        self._since = -math.inf

    def see(self, seen: Seen, now: float) -> bool:
        """The record was read, at ``now`` at the latest. True if its holder is another than before."""
        other = self._seen is None or self._seen.holder != seen.holder
        if seen != self._seen:
            self._seen, self._since = seen, now
        return other

    def left(self, now: float) -> float:
        """Seconds until it may be taken; 0 when it is free. It is not before :meth:`see` was called."""
        if self._seen is None:
            return math.inf
        if not self._seen.holder:
            return 0.0
        return max(0.0, self._since + self._seen.lease - now)
