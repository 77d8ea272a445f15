"""What every way of moving the server has in common, so that one loop can interleave them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from quicferry.bench.figures import Move, Throughput, Trace
from quicferry.bench.load import Gap
from quicferry.protocol.events import AnyEvent


class Measured(NamedTuple):
    """One move's figures; ``throughput`` if it was made under a bulk stream."""

    move: Move
    throughput: Throughput | None
    trace: Trace
    events: Sequence[AnyEvent] = ()
    """The move's log, where it has one."""
    gap: Gap | None = None
    """When its pause was, for ``ferry``."""


class Variant(Protocol):
    """Opened once, moved often, closed in any case."""

    name: str
    what: str

    async def open(self) -> None:
        """Everything that can be done ahead. Raises FerryError."""

    async def move(self, *, bulk: bool = False) -> Measured:
        """One move under load. Raises FerryError ``setup_failed``, TimeoutError."""

    async def close(self) -> None:
        """Leave nothing; safe to repeat."""
