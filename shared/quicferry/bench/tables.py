"""A result as Markdown: what the command prints, and what docs/performance.md holds between its marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from quicferry.bench.figures import Point, Result, Summary, Variant
from quicferry.protocol.errors import FerryError

BEGIN: Final = "<!-- bench: begin; `quicferry bench --report FILE --into docs/performance.md` writes this -->"
END: Final = "<!-- bench: end -->"
NONE: Final = "–"


def markdown(result: Result) -> str:
    """All tables."""
    parts = [_machine(result)]
    if result.variants:
        parts += ["### Pauses", _pauses(result.variants), "### What the client kept", _kept(result.variants)]
        if phases := _phases(result.variants):
            parts += ["### Phases, median ms", phases]
    if points := result.curves.get("connections"):
        parts += ["### Over connections", _curve("connections", points, crowd=True)]
    if points := result.curves.get("memory"):
        parts += ["### Over resident memory", _curve("MB", points, crowd=False)]
    return "\n\n".join(parts)


def insert(page: str, result: Result) -> str:
    """``page`` with the tables between its marks. Raises FerryError ``bad_settings`` if it has none."""
    head, tail = split(page)
    return f"{head}{BEGIN}\n\n{markdown(result)}\n\n{END}{tail}"


def split(page: str) -> tuple[str, str]:
    """What is before and behind the marks. Raises FerryError ``bad_settings`` if ``page`` has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise FerryError("bad_settings", "The page has no marks to put the tables between.", hint=f"{BEGIN} … {END}")
    return head, tail


def _machine(result: Result) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    facts = [
        f"`{result.command}`" if result.command else "",
        f"at {machine.at}, commit {machine.commit or 'unknown'}",
        f"kernel {machine.kernel}, {machine.cores} × {machine.cpu or 'unknown'}, {machine.memory_mb} MB, "
        f"load before {machine.load}",
        versions,
    ]
    return "  \n".join(fact for fact in facts if fact)


def _pauses(variants: dict[str, Variant]) -> str:
    return _table(
        ("variant", "moves", "failed", "gap median", "p90", "p99", "worst", "frozen", "restore", "gap ÷ floor"),
        (
            (
                f"`{name}`",
                str(one.moves),
                str(len(one.failed)),
                *_four(one.gap_ms),
                _ms(one.frozen_ms),
                _ms(one.restore_ms),
                f"{one.gap_over_floor.median:.2f}" if one.gap_over_floor else NONE,
            )
            for name, one in variants.items()
        ),
    )


def _kept(variants: dict[str, Variant]) -> str:
    return _table(
        (
            *("variant", "echoes sent", "lost", "handshakes after the first", "packets declared lost"),
            *("window before, bytes", "after", "throughput before, MB/s", "first second after ÷ before", "image, MB"),
        ),
        (
            (
                f"`{name}`",
                str(one.echoes_sent),
                str(one.echoes_lost),
                str(one.handshakes),
                str(one.retransmissions),
                f"{one.cwnd_before.median:.0f}" if one.cwnd_before else NONE,
                f"{one.cwnd_after.median:.0f}" if one.cwnd_after else NONE,
                f"{one.throughput_before_mb_s.median:.1f}" if one.throughput_before_mb_s else NONE,
                f"{one.throughput_ratio.median:.2f}" if one.throughput_ratio else NONE,
                f"{one.image_mb.median:.1f}" if one.image_mb else NONE,
            )
            for name, one in variants.items()
            if one.echoes_sent
        ),
    )


def _phases(variants: dict[str, Variant]) -> str:
    names = list(dict.fromkeys(phase for one in variants.values() for phase in one.phases_ms))
    if not names:
        return ""
    return _table(
        ("variant", *names),
        (
            (f"`{name}`", *(_ms(one.phases_ms.get(phase)) for phase in names))
            for name, one in variants.items()
            if one.phases_ms
        ),
    )


def _curve(what: str, points: Sequence[Point], *, crowd: bool) -> str:
    head = [what, "moves", "gap median", "worst", "floor", "gap ÷ floor", "÷ the first", "image, MB", "echoes lost"]
    if crowd:
        head += ["arrived", "others' interruption, median", "worst"]
    first = points[0].gap_ms
    rows = []
    for point in points:
        gap, over = point.gap_ms, point.gap_over_floor
        row = [str(point.x), str(point.moves), _ms(gap), f"{gap.max:.1f}" if gap else NONE, _ms(point.floor_ms)]
        row += [f"{over.median:.2f}" if over else NONE]
        row += [f"{gap.median / first.median:.2f}" if gap and first and first.median else NONE]
        row += [f"{point.image_mb.median:.1f}" if point.image_mb else NONE, str(point.echoes_lost)]
        if crowd:
            others = point.interruption_ms
            row += [f"{point.arrived}/{point.x}", _ms(others), f"{others.max:.1f}" if others else NONE]
        rows.append(row)
    return _table(head, rows)


def _four(summary: Summary | None) -> tuple[str, str, str, str]:
    if summary is None:
        return (NONE,) * 4
    return (f"{summary.median:.1f}", f"{summary.p90:.1f}", f"{summary.p99:.1f}", f"{summary.max:.1f}")


def _ms(summary: Summary | None) -> str:
    return f"{summary.median:.1f}" if summary is not None else NONE


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
