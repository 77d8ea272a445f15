"""One migration's log as a timeline: who saw what when, where nothing happened, what the clients waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from quicferry.cli import describe
from quicferry.cli.logfile import Entry
from quicferry.cli.output import Cell, Output, Row
from quicferry.migration.report import Report, report
from quicferry.protocol import events as ev
from quicferry.protocol.errors import FerryError

GAP_MS: Final = 250
"""Silence this long gets a line of its own."""
HEADINGS: Final = ("", "ms", "+ms", "source", "event", "details")


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One entry, placed in time. ``events --json`` and ``migrate --json`` print these."""

    seq: int
    offset_ms: int
    """Since the request, by the clock of whoever wrote the event."""
    delta_ms: int
    """Since the latest entry before it; 0 for one that was written late."""
    critical: bool | None
    """From the source's hold to the target's resume: what clients wait for. None while it runs."""
    event: ev.AnyEvent


def moment_of(entry: Entry, *, start_ms: int, latest_ms: int, critical: bool | None = None) -> Moment:
    """One entry, when the request was written at ``start_ms`` and the latest before it at ``latest_ms``."""
    at_ms = entry.event.at_ms
    return Moment(
        seq=entry.seq,
        offset_ms=at_ms - start_ms,
        delta_ms=max(at_ms - latest_ms, 0),
        critical=critical,
        event=entry.event,
    )


def moments(entries: Sequence[Entry]) -> list[Moment]:
    """Every entry in the log's order."""
    start = latest = entries[0].event.at_ms
    first, last = _critical(entries)
    placed = []
    for number, entry in enumerate(entries):
        placed.append(moment_of(entry, start_ms=start, latest_ms=latest, critical=first <= number <= last))
        latest = max(latest, entry.event.at_ms)
    return placed


def _critical(entries: Sequence[Entry]) -> tuple[int, int]:
    """The first and the last entry of the path from freeze to resume; (0, -1) when nothing was frozen."""
    first = next((n for n, entry in enumerate(entries) if isinstance(entry.event, ev.SourceHeld)), None)
    if first is None:
        return 0, -1
    ends = (ev.Resumed, ev.SourceBack, ev.Adopted)
    rest = enumerate(entries[first:], first)
    return first, next((n for n, entry in rest if isinstance(entry.event, ends)), len(entries) - 1)


def summarise(entries: Sequence[Entry]) -> Report:
    """The log's figures. Raises FerryError ``log_unreadable`` when it does not begin with its request."""
    try:
        return report(entry.event for entry in entries)
    except ValueError as error:
        raise FerryError("log_unreadable", f"The log is incomplete: {error}.") from None


def show(out: Output, entries: Sequence[Entry]) -> None:
    """Print the timeline and its figures."""
    placed = moments(entries)
    result = summarise(entries)
    if out.as_json:
        for moment in placed:
            out.record(moment)
        out.record({"result": result})
        return
    out.table(HEADINGS, _rows(placed), right=(1, 2))
    out.line()
    out.table(("", ""), _figures(placed, result))


def _rows(placed: Sequence[Moment]) -> Iterator[Row]:
    for moment in placed:
        if moment.delta_ms >= GAP_MS:
            yield ("", "", "", "", Cell("⋮", "yellow"), Cell(f"nothing for {describe.ms(moment.delta_ms)}", "yellow"))
        source, _, name = ev.kind(moment.event).partition(".")
        bold = "bold" if source == "decision" else ""
        failed = "failed" in name or name in ("timeout", "rolled_back")
        yield (
            Cell("┃", "magenta") if moment.critical else "",
            f"{moment.offset_ms}",
            Cell(f"{moment.delta_ms}" if moment.delta_ms else "", "dim"),
            Cell(source, bold),
            Cell(name, "red" if failed else bold),
            describe.details(moment.event),
        )


def _figures(placed: Sequence[Moment], result: Report) -> Iterator[Row]:
    outcome = (result.outcome or "under way").replace("_", " ")
    yield "outcome", f"{outcome} after {describe.ms(result.took_ms)}"
    if result.reason:
        yield "reason", f"{result.reason.code}: {result.reason.message}"
        if result.reason.hint:
            yield "what to do", result.reason.hint
    critical = [moment for moment in placed if moment.critical]
    if critical:
        yield Cell("┃ standstill", "magenta"), _still(critical)
    if result.frozen_ms is not None:
        parts = [f"frozen {describe.ms(result.frozen_ms)}"]
        if result.restore_ms is not None:
            parts.append(f"restore {describe.ms(result.restore_ms)}")
        if result.image_bytes is not None:
            parts.append(f"images {describe.size(result.image_bytes)}")
        yield "CRIU", ", ".join(parts)
    yield "clients", f"{result.clients} told, {result.acks} acked"
    if result.interruption_ms is not None and result.worst_interruption_ms is not None:
        worst = describe.ms(result.worst_interruption_ms)
        yield "interruption", f"{describe.ms(result.interruption_ms)} median, {worst} worst, as clients saw it"


def _still(critical: Sequence[Moment]) -> str:
    """From the hold to the resume, and what the time went into."""
    start = critical[0].offset_ms
    marks = {ev.Dumped: "dump", ev.Restored: "restore", ev.Committed: "commit", ev.Resumed: "resume"}
    parts: list[str] = []
    since = start
    for moment in critical:
        if name := marks.get(type(moment.event)):
            parts.append(f"{name} {max(moment.offset_ms - since, 0)}")
            since = moment.offset_ms
    of = f" = {' + '.join(parts)}" if parts else ""
    return f"{describe.ms(critical[-1].offset_ms - start)}{of}"
