"""What the benchmark says: the JSON's shape, and how many moves become one figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec

VERSION = 1


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over several moves; the unit is in the name of the field that holds it."""

    median: float
    p90: float
    p99: float
    max: float


def summary(values: Iterable[float | None]) -> Summary | None:
    """Over the values that are there; None without any. Percentiles are nearest-rank: always a value measured."""
    there = sorted(value for value in values if value is not None)
    if not there:
        return None

    def rank(share: float) -> float:
        return round(there[max(0, math.ceil(share * len(there)) - 1)], 3)

    return Summary(median=round(statistics.median(there), 3), p90=rank(0.9), p99=rank(0.99), max=rank(1.0))


class Echo(msgspec.Struct, frozen=True, array_like=True):
    """One ping: when it was sent and when its echo came, Unix seconds."""

    sent: float
    echoed: float


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One move as measured; times in milliseconds."""

    gap_ms: float
    """Last good echo before to first good echo after, by the client's clock."""
    sent: int
    lost: int
    handshakes: int
    """After the first."""
    retransmissions: int
    """Packets the client declared lost, from the move's start to a second after its end."""
    cwnd_before: int
    """Bytes; the client's, when the last good echo came."""
    cwnd_after: int
    """The smallest from there to a second after the first good echo."""
    frozen_ms: float | None = None
    """CRIU's own, as the next."""
    restore_ms: float | None = None
    image_bytes: int | None = None
    phases_ms: dict[str, float] = {}

    @property
    def floor_ms(self) -> float | None:
        if self.frozen_ms is None or self.restore_ms is None:
            return None
        return self.frozen_ms + self.restore_ms


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """A bulk stream's echoes in the last second before a move and the first after it, bytes a second."""

    before: float
    after: float


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """One move's round trips: [ms since the last good echo before the gap, round trip in ms]."""

    gap_ms: float
    points: list[tuple[float, float]]


class Variant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way to move the server, over all its moves."""

    what: str
    moves: int
    gap_ms: Summary | None
    floor_ms: Summary | None
    """CRIU's frozen_time and restore_time of the same moves, added up."""
    gap_over_floor: Summary | None
    echoes_sent: int
    echoes_lost: int
    handshakes: int
    """After the first of each connection, over all moves."""
    retransmissions: int
    failed: list[str] = []
    """Moves that went wrong and were made again, by what was said; they are in no other figure."""
    cwnd_before: Summary | None = None
    cwnd_after: Summary | None = None
    throughput_ratio: Summary | None = None
    """First second after ÷ last second before."""
    throughput_before_mb_s: Summary | None = None
    frozen_ms: Summary | None = None
    restore_ms: Summary | None = None
    image_mb: Summary | None = None
    """``floor`` only: frozen_time and restore_time of a server that no client spoke to."""
    phases_ms: dict[str, Summary] = {}
    samples_gap_ms: list[float] = []
    trace: Trace | None = None


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point of a curve: ``ferry`` with so many connections, or so much resident memory."""

    x: int
    moves: int
    gap_ms: Summary | None
    floor_ms: Summary | None
    gap_over_floor: Summary | None
    image_mb: Summary | None
    echoes_lost: int
    handshakes: int = 0
    arrived: int | None = None
    """Connections that reached the target, in the worst move."""
    interruption_ms: Summary | None = None
    """Over all connections of all moves, as each client's wrapper measured it."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it ran."""

    at: str
    """ISO 8601, UTC."""
    kernel: str
    cpu: str
    cores: int
    memory_mb: int
    load: float
    """Runnable processes on average in the minute before (proc_loadavg(5))."""
    versions: dict[str, str]
    commit: str = ""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json FILE`` holds."""

    machine: Machine
    variants: dict[str, Variant]
    curves: dict[str, list[Point]]
    command: str = ""
    v: int = VERSION


def variant(
    what: str,
    moves: Sequence[Move],
    *,
    bulk: Sequence[Throughput] = (),
    trace: Trace | None = None,
    failed: Sequence[str] = (),
) -> Variant:
    """Sum up a variant's moves."""
    names = list(dict.fromkeys(name for move in moves for name in move.phases_ms))
    phases = {name: summary(move.phases_ms.get(name) for move in moves) for name in names}
    return Variant(
        what=what,
        moves=len(moves),
        gap_ms=summary(move.gap_ms for move in moves),
        floor_ms=summary(move.floor_ms for move in moves),
        gap_over_floor=over_floor(moves),
        echoes_sent=sum(move.sent for move in moves),
        echoes_lost=sum(move.lost for move in moves),
        handshakes=sum(move.handshakes for move in moves),
        retransmissions=sum(move.retransmissions for move in moves),
        failed=list(failed),
        cwnd_before=summary(move.cwnd_before for move in moves),
        cwnd_after=summary(move.cwnd_after for move in moves),
        throughput_ratio=summary(one.after / one.before for one in bulk if one.before),
        throughput_before_mb_s=summary(one.before / 1e6 for one in bulk),
        frozen_ms=summary(move.frozen_ms for move in moves),
        restore_ms=summary(move.restore_ms for move in moves),
        image_mb=summary(None if move.image_bytes is None else move.image_bytes / 1e6 for move in moves),
        phases_ms={name: figure for name, figure in phases.items() if figure is not None},
        samples_gap_ms=[round(move.gap_ms, 3) for move in moves],
        trace=trace,
    )


def over_floor(moves: Iterable[Move]) -> Summary | None:
    """The gap ÷ the same move's floor."""
    return summary(move.gap_ms / move.floor_ms for move in moves if move.floor_ms)


def write(result: Result) -> bytes:
    """As JSON, one variant a line: it goes into the repository, and a new run should make a readable diff."""
    plain = msgspec.to_builtins(result)
    lines = []
    for key, value in plain.items():
        if key in ("variants", "curves"):
            inner = ",\n".join(f"  {_json(name)}: {_json(one)}" for name, one in value.items())
            lines.append(f" {_json(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {_json(key)}: {_json(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
