"""What one migration's log adds up to: outcome, the clients' interruption, CRIU's own figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec

from quicferry.protocol import events as ev
from quicferry.protocol.api import Place
from quicferry.protocol.errors import ErrorBody


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One migration in figures; times in milliseconds, None where the log does not say."""

    id: str
    service: str
    source: Place
    target: Place
    outcome: str | None
    reason: ErrorBody | None
    clients: int
    """Clients told of the move."""
    acks: int
    interruption_ms: float | None
    """The median over the clients, as each measured it; an application's word goes before its wrapper's."""
    worst_interruption_ms: float | None
    frozen_ms: float | None
    """CRIU's own, as the next."""
    restore_ms: float | None
    image_bytes: int | None
    took_ms: int
    """From the request to the last entry."""


def report(events: Iterable[ev.AnyEvent]) -> Report:
    """Sum one migration's log up. Raises ValueError when it does not begin with its request."""
    log = list(events)
    if not log or not isinstance(log[0], ev.Requested):
        raise ValueError("a migration's log begins with its request")
    request = log[0]
    measured: dict[str, float] = {}
    acks: set[str] = set()
    clients = 0
    outcome: str | None = None
    reason: ErrorBody | None = None
    dumped: ev.Dumped | None = None
    frozen_ms: float | None = None
    restore_ms: float | None = None
    for event in log:
        match event:
            case ev.MigrateSent():
                clients = event.clients
            case ev.AckSeen():
                acks.add(event.client)
            case ev.Dumped():
                dumped = event
            case ev.SourceGone():
                frozen_ms = event.frozen_ms
            case ev.Resumed():
                restore_ms = event.restore_ms
            case ev.ClientArrived(source="application"):
                measured[event.client] = event.interruption_ms
            case ev.ClientArrived():
                measured.setdefault(event.client, event.interruption_ms)
            case ev.Completed() | ev.RolledBack() | ev.Failed():
                outcome = ev.kind(event).partition(".")[2]
                reason = None if isinstance(event, ev.Completed) else event.reason
            case _:
                pass
    return Report(
        id=request.id,
        service=request.service,
        source=request.source,
        target=request.target,
        outcome=outcome,
        reason=reason,
        clients=clients,
        acks=len(acks),
        interruption_ms=round(statistics.median(measured.values()), 1) if measured else None,
        worst_interruption_ms=round(max(measured.values()), 1) if measured else None,
        frozen_ms=frozen_ms,
        restore_ms=restore_ms,
        image_bytes=dumped.image_bytes if dumped else None,
        took_ms=log[-1].at_ms - request.at_ms,
    )
