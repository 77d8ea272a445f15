"""What is first done with a message that NATS brought: the coordinator's book and choice, the command's views."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from quicferry.bus.log import Entry as BusEntry
from quicferry.bus.log import _decode as decode_entry
from quicferry.bus.refusals import error_of
from quicferry.cli import describe, history, logfile, phases, query, timeline
from quicferry.cli.output import Cell, Output, Row, printable
from quicferry.host.images import Images
from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from quicferry.protocol import wire
from quicferry.protocol.agents import AgentRequest, ArmRequest
from quicferry.protocol.api import Address, Berth, ErrorReply, Placement, ServicesReply, StatusReply
from quicferry.protocol.control import FromServer, LineDecoder
from quicferry.protocol.errors import CODES, FerryError
from quicferry.quic.move import Move
from services.coordinator import places
from services.coordinator.book import Book, status_of

LONGEST_ERROR: Final = 1024
MOST_ENTRIES: Final = 200
NOW_MS: Final = 1_764_000_000_000
HOME: Final = Address(host="127.0.0.1", port=4242)


def refused(error: FerryError, code: str = "bad_request") -> None:
    """A refusal has the code, is short whatever it refuses, and reaches whoever asked."""
    assert error.code == code
    assert len(str(error)) < LONGEST_ERROR, "an error as long as its cause"
    known = error_of(wire.encode(ErrorReply(error=error.body())), {})
    assert (known.code, known.message, known.path) == (error.code, error.message, error.path)


def used(message: Any) -> None:
    """Give ``message`` to whoever it is for."""
    match message:
        case Berth():
            _chosen([message], None)
        case Placement():
            _chosen([], message)
        case ServicesReply():
            query.show_services(Output(out=io.StringIO()), message, NOW_MS)
        case StatusReply():
            query.show_status(Output(out=io.StringIO()), message.migrations, NOW_MS)
        case ErrorReply():
            _told(FerryError.of(message.error))
        case AgentRequest():
            root = Path("/images")
            assert Images(root, message.id, "source").path.resolve().parent == root
        case ArmRequest() if message.target is not None:
            line = Move(message.id, message.target, message.epoch, message.options).line
            assert len(list(LineDecoder[Any](FromServer).feed(line))) == 1, "clients could not read where to go"
        case _:
            pass


def _chosen(berths: list[Berth], placement: Placement | None) -> None:
    """As the coordinator does on a request: what it then writes into the log must be readable."""
    service = berths[0].service if berths else placement.service if placement else ""
    spare = Berth(
        node="n1",
        berth="spare",
        service=service,
        address=HOME,
        port=4242,
        occupied=False,
        container="c",
        image="i",
        seen_ms=NOW_MS,
    )
    places.services(berths, {service: placement} if placement else {}, NOW_MS)
    try:
        source = places.source(service, berths, placement, NOW_MS)
        target = places.target(service, None, source, [*berths, spare], NOW_MS)
    except FerryError:
        return
    epoch = (placement.epoch if placement else 0) + 1
    requested = ev.Requested(id="m1", at_ms=NOW_MS, service=service, source=source, target=target, epoch=epoch)
    if epoch < 2**53:
        assert wire.decode(wire.encode(requested), ev.AnyEvent) == requested, "a log entry that nobody can read"


def log(lines: bytes) -> None:
    """One event a line, as the log's stream delivers them."""
    entries: list[logfile.Entry] = []
    for line in lines.split(b"\n")[:MOST_ENTRIES]:
        try:
            event: ev.AnyEvent = wire.decode(line, ev.AnyEvent)
        except FerryError as error:
            refused(error)
            continue
        subject = ev.subject(event)
        assert re.fullmatch(r"quicferry\.log(\.[A-Za-z0-9_-]+){2,3}", subject), "no subject of the log"
        assert decode_entry(subject, line, 1) == BusEntry(1, event)
        assert decode_entry("quicferry.log.other.decision", line, 1) is None
        entries.append(logfile.Entry(len(entries) + 1, event))
    followed(entries)


def exported(data: bytes) -> None:
    """A file that says it is an exported log."""
    try:
        migration, entries = logfile._parse(io.BytesIO(data), "f")
    except FerryError as error:
        refused(error, "log_unreadable")
        return
    again = logfile._parse(io.BytesIO(b"".join(logfile.encode(migration, entries))), "f")
    assert again == (migration, entries)
    followed(entries[:MOST_ENTRIES])


def followed(entries: list[logfile.Entry]) -> None:
    """The coordinator's book, a person's timeline and the replay take any log, true or not."""
    book = Book()
    for entry in entries:
        taken = book.take(BusEntry(entry.seq, entry.event))
        if taken is not None:
            wire.encode(StatusReply(migrations=[status_of(taken.state)]))
            for command in taken.commands:
                assert describe.command(command)
    assert not book._broken, "the state machine failed"
    mine = [entry for entry in entries if entry.event.id == entries[0].event.id]
    if mine and isinstance(mine[0].event, ev.Requested):
        _shown(mine)


def _shown(entries: list[logfile.Entry]) -> None:
    placed, result = timeline.moments(entries), timeline.summarise(entries)
    steps = replay(entry.event for entry in entries)
    for row in [*timeline._rows(placed), *timeline._figures(placed, result), *history._replay_rows(entries, steps)]:
        _check_row(row)
    narrator = phases.Narrator()
    for entry in entries:
        narrator.feed(entry)
    assert describe.verdict(result)
    out = io.StringIO()
    timeline.show(Output(as_json=True, out=out), entries)
    for line in out.getvalue().splitlines():
        msgspec.json.decode(line)


def _check_row(row: Row) -> None:
    for cell in row:
        text = printable(cell.text if isinstance(cell, Cell) else cell)
        assert text.isprintable(), "what others wrote drives the terminal"


def _told(error: FerryError) -> None:
    assert error.code in CODES
    err = io.StringIO()
    Output(err=err).error(error)
    assert all(line.isprintable() for line in err.getvalue().split("\n")), "an error drives the terminal"
    err = io.StringIO()
    Output(as_json=True, err=err).error(error)
    assert msgspec.json.decode(err.getvalue())
