"""A soak's result as a page of text, 80 columns at most. No I/O."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from tests.soak.leaks import MIB, Reading, What
from tests.soak.record import Life, Move, Result

WIDTH: Final = 80


def page(result: Result) -> str:
    """All of it."""
    parts = [
        _head(result),
        _outcomes(result.moves),
        _faults(result),
        _gaps(result.moves),
        _sessions(result),
        _resources(result),
        _wrong(result),
    ]
    lines = [line for part in parts for line in (*part, "")]
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def progress(result: Result, at: float) -> str:
    """One line on how it stands."""
    ends = Counter(move.outcome for move in result.moves if move.outcome)
    told = ", ".join(f"{ends[name]} {name.replace('_', ' ')}" for name in ("completed", "rolled_back", "failed"))
    return (
        f"{at:5.0f} s  {told}, {ends['refused']} refused; {len(result.faults)} faults, "
        f"{len(result.violations)} violations"
    )


def percentile(figures: Sequence[float], share: float) -> float:
    """The smallest figure that ``share`` of all are not above (nearest rank). ``figures`` are not empty."""
    ordered = sorted(figures)
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def _head(result: Result) -> list[str]:
    return [
        f"soak of {result.seconds / 60:.1f} min, seed {result.seed}: {result.services} services, "
        f"{result.clients} clients each, {result.calms} calms"
    ]


def _outcomes(moves: Iterable[Move]) -> list[str]:
    """By outcome and code: alone, cancelled, and with a fault at work."""
    columns = ("alone", "cancelled", "fault")
    counts: dict[str, Counter[str]] = {}
    for move in moves:
        name = ": ".join(part for part in (move.outcome or "under way", move.code) if part)
        counts.setdefault(name, Counter())[_class(move)] += 1
    lines = [f"{'moves':<38}" + "".join(f"{column:>10}" for column in (*columns, "all"))]
    for name in sorted(counts, key=lambda name: (-counts[name].total(), name)):
        figures = [*(counts[name][column] for column in columns), counts[name].total()]
        lines.append(f"  {name:<36}" + "".join(f"{figure or '-':>10}" for figure in figures))
    return lines


def _class(move: Move) -> str:
    if move.faults:
        return "fault"
    return "cancelled" if move.cancelled else "alone"


def _faults(result: Result) -> list[str]:
    counts = Counter(fault.kind for fault in result.faults)
    lines = [f"{'faults':<38}{'struck':>10}"]
    lines += [f"  {kind:<36}{count:>10}" for kind, count in sorted(counts.items())]
    return [*lines, f"  {'bad requests, all refused':<36}{result.bad_requests:>10}"]


def _gaps(moves: Sequence[Move]) -> list[str]:
    """Per session and move, in milliseconds."""
    kinds = {
        "completed, no fault": [m for m in moves if m.outcome == "completed" and not m.faults],
        "completed, with a fault": [m for m in moves if m.outcome == "completed" and m.faults],
        "rolled back, no fault": [m for m in moves if m.outcome == "rolled_back" and not m.faults],
        "rolled back, with a fault": [m for m in moves if m.outcome == "rolled_back" and m.faults],
    }
    columns = ("gaps", "median", "p90", "p99", "max")
    lines = [f"{'gap of a session in a move, ms':<38}" + "".join(f"{column:>8}" for column in columns)]
    for name, chosen in kinds.items():
        gaps = [gap for move in chosen for gap in move.gaps_ms]
        if gaps:
            figures = [percentile(gaps, share) for share in (0.5, 0.9, 0.99, 1.0)]
            lines.append(f"  {name:<36}{len(gaps):>8}" + "".join(f"{figure:>8.0f}" for figure in figures))
    return lines


def _sessions(result: Result) -> list[str]:
    return [
        f"echoes    {result.echoes_sent} sent, {result.echoes_lost} lost",
        f"sessions  {result.sessions}, {result.handshakes} handshakes",
        f"  with a killed server ended {result.sessions_ended_with_their_server} of them, with "
        f"{result.echoes_unanswered} echoes on their way",
    ]


def _resources(result: Result) -> list[str]:
    lines = [f"{'resources':<19}{'lives':>6}{'fds':>14}{'threads':>11}{'MiB':>18}  leaks"]
    for process in dict.fromkeys(life.process for life in result.lives):
        lives = [life for life in result.lives if life.process == process]
        longest = max(lives, key=lambda life: len(life.calm))
        if not longest.calm:
            continue
        found = [trend for trend in result.trends if trend.process == process]
        judged = {trend.what for trend in found}
        leaks = ", ".join(dict.fromkeys(trend.what for trend in found if trend.leak)) or _verdict(judged)
        figures = [_span(longest, what) for what in ("fds", "threads", "memory")]
        lines.append(f"  {process:<17}{len(lives):>6}{figures[0]:>14}{figures[1]:>11}{figures[2]:>18}  {leaks}")
    lines.append("  of the longest life: first calm/last calm/most ever; '-': too short to judge")
    restarts = ", ".join(f"{name} {count}" for name, count in result.restarts.items() if count)
    return [
        *lines,
        f"restarts: {restarts or 'none'}",
        f"images: {result.images_max / MIB:.1f} MiB at most",
        f"processes in berths: {result.processes_calm} in the last calm, {result.processes_max} at most",
    ]


def _verdict(judged: set[What]) -> str:
    """``no`` if all was judged, ``-`` if it was too early for memory, or for anything."""
    if "memory" in judged:
        return "no"
    return "no; MiB -" if judged else "-"


def _span(life: Life, what: str) -> str:
    def of(reading: Reading) -> str:
        figure = getattr(reading, what)
        return f"{figure / MIB:.1f}" if what == "memory" else f"{figure}"

    return "/".join(of(reading) for reading in (life.calm[0], life.calm[-1], life.most or life.calm[-1]))


def _wrong(result: Result) -> list[str]:
    lines = [
        f"LEAK  {trend.process}: {trend.what} {trend.early:.0f} -> {trend.late:.0f}, {trend.per_move:.2f} a move"
        for trend in result.leaks
    ]
    for violation in result.violations:
        head = f"VIOLATION  {violation.at:.0f} s {violation.service} {violation.migration}".rstrip()
        lines += [head, *textwrap.wrap(violation.what, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")]
        lines += [f"  {violation.evidence}"] if violation.evidence else []
    if result.clean:
        return ["clean: no violation, no leak"]
    return [*lines, f"{len(result.violations)} violations, {len(result.leaks)} leaks; seed {result.seed}"]
