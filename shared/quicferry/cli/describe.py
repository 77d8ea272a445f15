"""Events, commands and figures in a person's words, each on one short line."""

from __future__ import annotations

from quicferry.migration.commands import ArmServer, CallAgent, Command, Decide, StartTimer
from quicferry.migration.report import Report
from quicferry.protocol import events as ev
from quicferry.protocol.api import Address, Place
from quicferry.protocol.errors import ErrorBody

SHORT_IMAGE = 12


def place(where: Place) -> str:
    """``node/berth``."""
    return f"{where.node}/{where.berth}"


def address(where: Address) -> str:
    """``host:port``, with brackets around IPv6."""
    host = f"[{where.host}]" if ":" in where.host else where.host
    return f"{host}:{where.port}"


def image(name: str) -> str:
    """The first digits of an image's id, as podman shows them."""
    return name.removeprefix("sha256:")[:SHORT_IMAGE]


def memory(event: ev.SourceReady) -> str:
    """The server's, and how much of it is not copied."""
    shared = f" ({size(event.shared_bytes)} shared)" if event.shared_bytes else ""
    return f"{size(event.rss_bytes)} resident{shared}"


def size(count: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def ms(value: float) -> str:
    """A duration in milliseconds: one decimal below 100, none above."""
    return f"{value:.1f} ms" if value < 100 and value != int(value) else f"{value:,.0f} ms"


def age(seconds: float) -> str:
    """A time span in one unit."""
    seconds = max(seconds, 0)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86_400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds // 86_400:.0f} d"


def error_line(error: ErrorBody) -> str:
    """``code: message``."""
    return f"{error.code}: {error.message}"


def count(number: int, noun: str) -> str:
    """``1 client``, ``2 clients``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def details(event: ev.AnyEvent) -> str:
    """An event's own fields, without what every event has."""
    if isinstance(event, ev.Decision):
        return _decision(event)
    match event:
        case ev.CancelAsked() | ev.TimedOut() | ev.CallFailed() | ev.Armed() | ev.Disarmed():
            return _coordinator(event)
        case ev.MigrateSent() | ev.AckSeen() | ev.Quiesced() | ev.Adopted() | ev.ClientArrived():
            return _server(event)
        case _:
            return _agent(event)


def _decision(event: ev.Decision) -> str:
    match event:
        case ev.Requested():
            return f"{event.service} from {place(event.source)} to {place(event.target)}, epoch {event.epoch}"
        case ev.RolledBack() | ev.Failed():
            return error_line(event.reason)
        case ev.Completed():
            return f"{count(event.arrived, 'client')} arrived"
        case ev.Committed():
            return "from here only forward"
        case ev.Prepared():
            return ""


def _coordinator(event: ev.CancelAsked | ev.TimedOut | ev.CallFailed | ev.Armed | ev.Disarmed) -> str:
    match event:
        case ev.TimedOut():
            return f"{event.phase}{_attempt(event.attempt)}"
        case ev.CallFailed():
            return f"{event.to}{_attempt(event.attempt)}: {error_line(event.error)}"
        case ev.Armed():
            return f"{count(event.clients, 'client')} connected"
        case ev.Disarmed():
            return "the server keeps its socket"
        case ev.CancelAsked():
            return "somebody asked to call it off"


def _server(event: ev.MigrateSent | ev.AckSeen | ev.Quiesced | ev.Adopted | ev.ClientArrived) -> str:
    match event:
        case ev.MigrateSent():
            return f"{count(event.clients, 'client')} told"
        case ev.AckSeen():
            return f"{event.client} after {ms(event.after_ms)}"
        case ev.Quiesced():
            closed = f", {event.closed} without hello closed" if event.closed else ""
            return f"{event.acks} of {count(event.clients, 'client')} acked, {event.ready} ready{closed}"
        case ev.Adopted():
            return f"{event.outcome.replace('_', ' ')}, stood still for {ms(event.still_ms)}"
        case ev.ClientArrived():
            return f"{event.client} ({event.source}): interrupted {ms(event.interruption_ms)}"


def _agent(event: ev.AnyEvent) -> str:
    match event:
        case ev.SourceReady():
            return f"image {image(event.image)}, {memory(event)}"
        case ev.TargetReady():
            return f"image {image(event.image)}, port bound"
        case ev.PreDumped():
            return f"round {event.round}: {count(event.pages, 'page')} in {ms(event.took_ms)}"
        case ev.SourceHeld():
            return f"{ms(event.waited_ms)} after SIGTERM"
        case ev.Dumped():
            volume = f"{count(event.pages, 'page')}, {size(event.image_bytes)}"
            return f"in {ms(event.took_ms)}: {volume}"
        case ev.Restored():
            return f"in {ms(event.took_ms)}"
        case ev.Resumed():
            restored = f"; restore_time {ms(event.restore_ms)}" if event.restore_ms is not None else ""
            return f"in {ms(event.took_ms)}; {size(event.queued)} waited{restored}"
        case ev.CheckpointFailed() | ev.RestoreFailed():
            return f"{event.verb}{_attempt(event.attempt)}: {error_line(event.error)}"
        case ev.SourceGone():
            frozen = f"; frozen_time {ms(event.frozen_ms)}" if event.frozen_ms is not None else ""
            return f"the frozen source was killed{frozen}"
        case ev.SourceBack():
            return "the source serves"
        case ev.TargetCleared():
            return "nothing left in the target"
        case _:
            return ""


def _attempt(number: int) -> str:
    return f" (attempt {number})" if number > 1 else ""


def command(given: Command) -> str:
    """What the state machine asked for, in a few words."""
    match given:
        case CallAgent():
            turn = f" round {given.round}" if given.round else ""
            return f"{given.name}{turn}{_attempt(given.attempt)}"
        case ArmServer():
            return given.name
        case Decide():
            return f"decide {given.decision}"
        case StartTimer():
            return f"timer {given.seconds:g} s"
        case _:
            return type(given).__name__.lower().replace("stoptimer", "no timer")


def verdict(result: Report) -> str:
    """How a migration ended, on one line of at most 80 columns."""
    if result.outcome != "completed":
        words = (result.outcome or "under way").replace("_", " ")
        return f"{words} after {ms(result.took_ms)}"
    parts = [f"acks {result.acks}/{result.clients}"]
    if result.interruption_ms is not None:
        parts.insert(0, f"interruption {result.interruption_ms:,.0f} ms")
    if result.frozen_ms is not None:
        parts.append(f"frozen {result.frozen_ms:,.0f} ms")
    if result.restore_ms is not None:
        parts.append(f"restore {result.restore_ms:,.0f} ms")
    return f"completed in {ms(result.took_ms)}: {', '.join(parts)}"
