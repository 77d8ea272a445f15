"""The meter tells each move once and in order, and keeps no more of them than it says."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

from quicferry.protocol.api import Address
from quicferry.quic.follower import REMEMBERED
from quicferry.quic.meter import MEASURED, Meter
from quicferry.quic.migration import Migration


class Moved:
    """A connection's side of the meter: its moves, of which it remembers the last, as the real one."""

    def __init__(self) -> None:
        self.history: deque[Migration] = deque(maxlen=REMEMBERED)
        self.reported: list[str] = []

    @property
    def migrations(self) -> tuple[Migration, ...]:
        return tuple(self.history)

    def move(self, name: str) -> Migration:
        self.history.append(Migration(name, Address(host="127.0.0.1", port=1), 0))
        return self.history[-1]

    def report_interruption(self, _: float, migration: Migration) -> None:
        self.reported.append(migration.id)

    def windows_around(self, _: Migration) -> tuple[int, int]:
        return 1, 1


def ids(pauses: list[Any]) -> list[str]:
    return [pause.id for pause in pauses]


def test_each_move_is_told_once_and_in_order() -> None:
    connection = Moved()
    meter = Meter(cast(Any, connection))
    assert meter.good() == []
    connection.move("first").end("arrived")
    second = connection.move("second")
    assert ids(meter.good()) == ["first"]
    second.end("replaced")
    connection.move("third").end("rolled_back")
    connection.move("fourth").end("arrived")
    connection.move("fifth")
    assert ids(meter.good()) == ["third", "fourth"]
    assert meter.good() == []
    assert ids(meter.pauses) == ["first", "third", "fourth"]
    assert connection.reported == ["first", "fourth"]


def test_a_client_that_lives_for_years_keeps_the_last_moves_only() -> None:
    connection = Moved()
    meter = Meter(cast(Any, connection))
    told: list[str] = []
    for number in range(MEASURED + 10):
        connection.move(f"m{number}").end("arrived")
        told += ids(meter.good())
    assert told == [f"m{number}" for number in range(MEASURED + 10)]
    assert ids(meter.pauses) == told[-MEASURED:]
