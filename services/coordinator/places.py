"""Where a service is and where it may go, from berths seen, placements and the log's verdicts. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from quicferry.protocol.api import Berth, Place, Placement
from quicferry.protocol.errors import FerryError
from services.coordinator.book import Verdict

FRESH_MS: Final = 10_000
"""A berth whose agent has not reported it for longer than this can't be counted on. All times here are NATS's."""


def same(one: Place, other: Place) -> bool:
    """The same berth, whatever address it had."""
    return (one.node, one.berth) == (other.node, other.berth)


def corrected(berths: Iterable[Berth], verdict: Callable[[str], Verdict | None]) -> list[Berth]:
    """Sightings from before the end of a service's newest migration, put right by what the log says of it."""
    return [_corrected(berth, verdict(berth.service)) for berth in berths]


def _corrected(berth: Berth, verdict: Verdict | None) -> Berth:
    if verdict is None or berth.seen_ms > verdict.at_ms:
        return berth
    if same(berth.place, verdict.occupied):
        return replace(berth, occupied=True)
    if same(berth.place, verdict.empty):
        return replace(berth, occupied=False)
    return berth


def current(service: str, berths: Sequence[Berth], placement: Placement | None, now_ms: int) -> Place | None:
    """Where ``service`` is: the occupied berth seen last, the placement's if that is one of several; else the
    placement, unless its berth was just seen empty."""
    occupied = [berth for berth in berths if berth.service == service and berth.occupied and _fresh(berth, now_ms)]
    if placement is not None:
        here = [berth for berth in berths if same(berth.place, placement.place)]
        if not occupied:
            seen_empty = any(_fresh(berth, now_ms) and not berth.occupied for berth in here)
            return None if seen_empty else placement.place
        for berth in occupied:
            if same(berth.place, placement.place):
                return berth.place
    return max(occupied, key=lambda berth: berth.seen_ms).place if occupied else None


def source(service: str, berths: Sequence[Berth], placement: Placement | None, now_ms: int) -> Place:
    """As :func:`current`. Raises FerryError ``unknown_service`` or ``server_gone`` if the service is nowhere."""
    place = current(service, berths, placement, now_ms)
    if place is not None:
        return place
    if placement is None and not any(berth.service == service for berth in berths):
        known = sorted({berth.service for berth in berths})
        raise FerryError(
            "unknown_service",
            f"No service {service!r} is known.",
            hint=f"Known: {', '.join(known)}."
            if known
            else "No berth has been reported; is a checkpoint agent running?",
            path="$.service",
        )
    raise FerryError(
        "server_gone",
        f"No server of {service!r} runs in any berth that was seen in the last {FRESH_MS // 1000} s.",
        hint="'quicferry services' shows the berths; are the server and its node's checkpoint agent running?",
    )


def target(service: str, to: str | None, source: Place, berths: Sequence[Berth], now_ms: int) -> Place:
    """The berth ``to`` (``berth`` or ``node/berth``) if the service may go there, or an empty one chosen.

    Raises FerryError ``unknown_berth``, ``same_berth``, ``berth_gone``, ``berth_busy`` or ``no_target``.
    """
    fitting = [berth for berth in berths if berth.service == service]
    if to is not None:
        return _named(service, to, source, fitting, now_ms)
    empty = [b for b in fitting if not b.occupied and not same(b.place, source) and _fresh(b, now_ms)]
    if not empty:
        others = ", ".join(_told(berth, now_ms) for berth in fitting if not same(berth.place, source))
        raise FerryError(
            "no_target",
            f"No empty berth is there for {service!r}.",
            hint=f"Its other berths: {others}." if others else "Start another berth with the service's label.",
        )
    # The source's own node first: a move within it needs no images on the wire.
    return min(empty, key=lambda berth: (berth.node != source.node, berth.node, berth.berth)).place


def _named(service: str, to: str, source: Place, fitting: Sequence[Berth], now_ms: int) -> Place:
    found = [berth for berth in fitting if names(to, berth.place)]
    if len(found) > 1:
        found = [berth for berth in found if berth.node == source.node] or found
    if not found:
        known = ", ".join(f"{berth.node}/{berth.berth}" for berth in fitting) or "none"
        raise FerryError(
            "unknown_berth",
            f"{service!r} has no berth {to!r}.",
            hint=f"Its berths: {known}.",
            path="$.to",
        )
    if len(found) > 1:
        raise FerryError(
            "unknown_berth",
            f"Several nodes have a berth {to!r}.",
            hint=f"Say which: {', '.join(f'{berth.node}/{berth.berth}' for berth in found)}.",
            path="$.to",
        )
    berth = found[0]
    if same(berth.place, source):
        raise FerryError("same_berth", f"{service!r} is in {berth.node}/{berth.berth} already.", path="$.to")
    if not _fresh(berth, now_ms):
        raise FerryError(
            "berth_gone",
            f"The berth {berth.node}/{berth.berth} has not been seen for {(now_ms - berth.seen_ms) / 1000:.0f} s.",
            hint="Are its container and its node's checkpoint agent running?",
            path="$.to",
        )
    if berth.occupied:
        raise FerryError("berth_busy", f"The berth {berth.node}/{berth.berth} holds a server.", path="$.to")
    return berth.place


def names(to: str, place: Place) -> bool:
    """Whether ``to``, a ``berth`` or ``node/berth``, means ``place``."""
    node, _, berth = to.rpartition("/")
    return berth == place.berth and node in ("", place.node)


def services(berths: Sequence[Berth], placements: Mapping[str, Placement], now_ms: int) -> list[Placement]:
    """Every service that is somewhere, by name."""
    found: list[Placement] = []
    for service in sorted({berth.service for berth in berths} | set(placements)):
        known = placements.get(service)
        place = current(service, berths, known, now_ms)
        if place is None:
            continue
        if known is not None and same(known.place, place):
            found.append(known)
        else:  # never moved by us, or started anew elsewhere since
            found.append(Placement(service=service, place=place, epoch=known.epoch if known else 0))
    return found


def _fresh(berth: Berth, now_ms: int) -> bool:
    return now_ms - berth.seen_ms < FRESH_MS


def _told(berth: Berth, now_ms: int) -> str:
    what = "occupied" if berth.occupied else "empty"
    if not _fresh(berth, now_ms):
        what = f"not seen for {(now_ms - berth.seen_ms) / 1000:.0f} s"
    return f"{berth.node}/{berth.berth} ({what})"
