"""Whether a process leaks, judged by readings that were taken in calm moments. No I/O.

A reading is taken when nothing is under way, so that descriptors and memory of moves do not count. Of one life of a
process the first readings are left out: a process that has just started fills its caches. The rest is cut into three;
the medians of the first and the last third are compared, so that a single odd reading decides nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

MIB: Final = 1 << 20
WARM_UP: Final = 0.25
"""The part of a life's readings that is left out,"""
WARM_UP_SECONDS: Final = 150.0
"""and for memory all readings of so long after the first: by then the traces of a client that pings twenty times a
second are as long as they get."""
ENOUGH: Final = 6
"""Readings that are judged, at least: two for each third."""
FDS: Final = 4
"""Descriptors more that are no leak: a connection to NATS or podman that is there or not, with its pipe or event."""
THREADS: Final = 3
"""Threads more: an executor of asyncio starts them as it needs them, and keeps them."""
MEMORY: Final = 5 * MIB
MEMORY_SHARE: Final = 0.10
"""Memory is a leak when it is more by both. What is kept by design has bounds, and was measured over 420 moves in
three minutes (``--services 1 --no-faults --pause 0.1``): the coordinator takes 4 KiB a migration, for the newest
1000, an agent 1 MiB for 512 steps, a server 1 MiB in all. None of it comes to MEMORY between two thirds of half an
hour."""

What = Literal["fds", "threads", "memory"]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One process in one calm moment."""

    at: float
    """Seconds since the soak began."""
    moves: int
    """Migrations that had ended by then."""
    fds: int
    threads: int
    memory: int
    """Bytes."""


class Trend(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one figure over one life of a process."""

    process: str
    what: What
    early: float
    late: float
    per_move: float
    """The slope of a line through the readings, by least squares."""
    leak: bool


def trends(process: str, readings: Sequence[Reading]) -> list[Trend]:
    """What a life's readings say; nothing if there are too few to judge."""
    left = readings[max(1, round(len(readings) * WARM_UP)) :]
    warm = [reading for reading in left if reading.at >= readings[0].at + WARM_UP_SECONDS]
    judged: tuple[tuple[What, Sequence[Reading]], ...] = (("fds", left), ("threads", left), ("memory", warm))
    return [_trend(process, what, readings) for what, readings in judged if len(readings) >= ENOUGH]


def _trend(process: str, what: What, readings: Sequence[Reading]) -> Trend:
    figures = [float(getattr(reading, what)) for reading in readings]
    third = len(figures) // 3
    early, late = statistics.median(figures[:third]), statistics.median(figures[-third:])
    return Trend(
        process=process,
        what=what,
        early=early,
        late=late,
        per_move=_slope([reading.moves for reading in readings], figures),
        leak=late - early > _allowed(what, early),
    )


def _allowed(what: What, early: float) -> float:
    match what:
        case "fds":
            return FDS
        case "threads":
            return THREADS
        case "memory":
            return max(MEMORY, MEMORY_SHARE * early)


def _slope(moves: Sequence[int], figures: Sequence[float]) -> float:
    if len(set(moves)) < 2:
        return 0.0
    return statistics.linear_regression(moves, figures).slope
