"""Where a service is and may go, from sightings, placements and verdicts."""

from __future__ import annotations

import pytest

from quicferry.cli import session
from quicferry.protocol.api import Address, Berth, Place, Placement
from quicferry.protocol.errors import FerryError
from services.coordinator import places
from services.coordinator.book import Verdict

NOW = 1_000_000


def berth(name: str, *, occupied: bool = False, node: str = "n1", seen_ms: int = NOW, service: str = "echo") -> Berth:
    return Berth(
        node=node,
        berth=name,
        service=service,
        address=Address(host="127.0.0.1", port=1),
        port=4242,
        occupied=occupied,
        container="c",
        image="i",
        seen_ms=seen_ms,
    )


def at(name: str, node: str = "n1") -> Place:
    return Place(node=node, berth=name, address=Address(host="10.0.0.1", port=2))


def placed(name: str, node: str = "n1") -> Placement:
    return Placement(service="echo", place=at(name, node), epoch=3)


def where(berths: list[Berth], placement: Placement | None = None) -> str | None:
    place = places.current("echo", berths, placement, NOW)
    return place.berth if place else None


def test_the_occupied_berth_wins() -> None:
    assert where([berth("a", occupied=True), berth("b")]) == "a"
    assert where([berth("a", occupied=True), berth("b")], placed("b")) == "a"
    assert where([berth("a", occupied=True, service="other")]) is None


def test_the_placement_decides_between_several() -> None:
    both = [berth("a", occupied=True, seen_ms=NOW - 1), berth("b", occupied=True)]
    assert where(both, placed("a")) == "a"
    assert where(both) == "b"
    assert where(both, placed("c")) == "b"


def test_the_placement_counts_where_nothing_fresh_contradicts() -> None:
    assert where([], placed("a")) == "a"
    assert where([berth("a", seen_ms=NOW - 60_000)], placed("a")) == "a"
    assert where([berth("a")], placed("a")) is None
    assert where([berth("b", occupied=True, seen_ms=NOW - 60_000)]) is None


def test_a_berth_keeps_its_newest_address() -> None:
    place = places.current("echo", [berth("a", occupied=True)], placed("a"), NOW)
    assert place is not None
    assert place.address.port == 1


def test_older_sightings_yield_to_the_log() -> None:
    verdict = Verdict(occupied=at("b"), empty=at("a"), at_ms=NOW)
    seen = [berth("a", occupied=True), berth("b"), berth("c", occupied=True)]
    corrected = places.corrected(seen, lambda _: verdict)
    assert [(found.berth, found.occupied) for found in corrected] == [("a", False), ("b", True), ("c", True)]
    newer = [berth("a", occupied=True, seen_ms=NOW + 1)]
    assert places.corrected(newer, lambda _: verdict) == newer
    assert places.corrected(seen, lambda _: None) == seen


def test_a_target_on_the_same_node_comes_first() -> None:
    berths = [berth("z"), berth("b", node="n0"), berth("a", occupied=True), berth("c", occupied=True)]
    assert places.target("echo", None, at("a"), berths, NOW).berth == "z"
    assert places.target("echo", None, at("a"), berths[1:], NOW) == berth("b", node="n0").place


@pytest.mark.parametrize(
    ("to", "code"),
    [
        ("a", "same_berth"),
        ("n1/a", "same_berth"),
        ("c", "berth_busy"),
        ("old", "berth_gone"),
        ("x", "unknown_berth"),
        ("n9/b", "unknown_berth"),
        ("twin", "unknown_berth"),
        ("foreign", "unknown_berth"),
    ],
)
def test_targets_that_will_not_do(to: str, code: str) -> None:
    berths = [
        berth("a", occupied=True),
        berth("b"),
        berth("c", occupied=True),
        berth("old", seen_ms=NOW - 10_000),
        berth("twin", node="n2"),
        berth("twin", node="n3"),
        berth("foreign", service="other"),
    ]
    with pytest.raises(FerryError) as caught:
        places.target("echo", to, at("a"), berths, NOW)
    assert caught.value.code == code
    assert caught.value.path == "$.to"


def test_a_twin_is_found_by_its_node() -> None:
    berths = [berth("a", occupied=True), berth("twin", node="n2"), berth("twin", node="n3"), berth("a", node="n2")]
    assert places.target("echo", "n3/twin", at("a"), berths, NOW).node == "n3"
    assert places.target("echo", "n2/a", at("a"), berths, NOW).node == "n2"


def test_no_target_says_why() -> None:
    berths = [berth("a", occupied=True), berth("c", occupied=True), berth("old", seen_ms=NOW - 20_000)]
    with pytest.raises(FerryError) as caught:
        places.target("echo", None, at("a"), berths, NOW)
    assert caught.value.code == "no_target"
    assert "n1/c (occupied)" in caught.value.hint
    assert "n1/old (not seen for 20 s)" in caught.value.hint


def test_a_service_that_is_nowhere() -> None:
    with pytest.raises(FerryError) as caught:
        places.source("echo", [berth("a", service="other")], None, NOW)
    assert (caught.value.code, caught.value.hint) == ("unknown_service", "Known: other.")
    with pytest.raises(FerryError) as caught:
        places.source("echo", [], None, NOW)
    assert "checkpoint agent" in caught.value.hint
    with pytest.raises(FerryError) as caught:
        places.source("echo", [berth("a")], placed("a"), NOW)
    assert caught.value.code == "server_gone"


def test_services_listed() -> None:
    berths = [
        berth("a", occupied=True),
        berth("b"),
        berth("x", service="other"),
        berth("y", service="new", occupied=True),
    ]
    found = places.services(berths, {"echo": placed("a"), "far": placed("f")}, NOW)
    assert [(placement.service, placement.place.berth, placement.epoch) for placement in found] == [
        ("echo", "a", 3),
        ("echo", "f", 3),
        ("new", "y", 0),
    ]
    moved_by_hand = places.services([berth("b", occupied=True)], {"echo": placed("a")}, NOW)
    assert [(p.place.berth, p.epoch, p.migration) for p in moved_by_hand] == [("b", 3, None)]


def test_the_command_line_counts_on_the_same_berths() -> None:
    assert session.FRESH_MS == places.FRESH_MS
