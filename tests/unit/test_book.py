"""What the book keeps of a migration, and for how long."""

from __future__ import annotations

from typing import Any

import msgspec

from quicferry.bus.log import Entry
from quicferry.protocol import events as ev
from services.coordinator.book import KEPT_ENDED, Book
from tests.unit.test_machine import A, B

CLIENTS = 500


def move(migration: str, clients: int) -> list[ev.AnyEvent]:
    base: dict[str, Any] = {"id": migration, "at_ms": 1}
    names = [f"car-{n}" for n in range(clients)]
    return [
        ev.Requested(**base, service="echo", source=A, target=B, epoch=1),
        ev.MigrateSent(**base, clients=clients),
        *(ev.AckSeen(**base, client=name, after_ms=1) for name in names),
        ev.Committed(**base),
        *(ev.ClientArrived(**base, client=name, source="wrapper", interruption_ms=1) for name in names),
        ev.Completed(**base, arrived=clients),
    ]


def taken(book: Book, *events: ev.AnyEvent) -> None:
    for event in events:
        book.take(Entry(0, event))


def test_an_ended_migration_takes_no_more_room_for_more_clients() -> None:
    """A thousand of them are kept: with their names that was 112 MB for 500 clients each."""
    book = Book()
    few, many = move("few", 1), move("many", CLIENTS)
    taken(book, *few, *many[:-1])
    status = book.status("many")
    assert status is not None
    assert (status.acks, status.outcome) == (CLIENTS, None)
    taken(book, many[-1])
    few_bytes, many_bytes = (len(msgspec.json.encode(book.state(migration))) for migration in ("few", "many"))
    assert many_bytes - few_bytes < 10
    status = book.status("many")
    assert status is not None
    assert (status.acks, status.clients, status.outcome) == (CLIENTS, CLIENTS, "completed")
    taken(book, *many[2:4])  # late ones
    assert book.status("many") == status
    assert book.newest(1) == [status]


def test_the_oldest_ended_ones_are_forgotten() -> None:
    book = Book()
    for n in range(KEPT_ENDED + 1):
        taken(book, *move(f"m{n}", 0))
    assert book.status("m0") is None
    assert book.state("m0") is None
    assert book.status("m1") is not None
    assert len(book.newest(2 * KEPT_ENDED)) == KEPT_ENDED
