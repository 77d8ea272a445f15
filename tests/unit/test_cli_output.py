"""What is printed fits 80 columns, one record stays one line in a pipe, and nobody else drives the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from quicferry.cli import describe
from quicferry.cli.history import show_replay
from quicferry.cli.logfile import Entry
from quicferry.cli.main import build_parser
from quicferry.cli.migrate import phase_line
from quicferry.cli.output import Output
from quicferry.cli.phases import Narrator
from quicferry.cli.query import show_services, show_status
from quicferry.cli.timeline import moments, show, summarise
from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from quicferry.protocol.api import Address, Berth, MigrationStatus, Options, Place, Placement, ServicesReply
from quicferry.protocol.errors import ErrorBody, FerryError

ID = "echo-20261124T061503-3fa2c1"
A = Place(node="local", berth="a", address=Address(host="127.0.0.1", port=14242))
B = Place(node="local", berth="b", address=Address(host="2001:db8:1234:5678:9abc:def0:1234:5678", port=14243))
IMAGE = "sha256:" + "0123456789abcdef" * 4
TOLD = ErrorBody(code="criu_failed", message="CRIU refused to dump: an io_uring is open.", hint="Close it.")


def at(ms: int, kind: type[ev.Event], **fields: object) -> ev.AnyEvent:
    return kind(id=ID, at_ms=1_764_000_000_000 + ms, **fields)  # type: ignore


def entries(events: list[ev.AnyEvent]) -> list[Entry]:
    """As the log would give them, with other migrations' entries in between."""
    return [Entry(100 + 3 * number, event) for number, event in enumerate(events)]


def until_dumped() -> list[ev.AnyEvent]:
    return [
        at(0, ev.Requested, service="echo", source=A, target=B, epoch=3, options=Options(pre_copy_rounds=2)),
        at(9, ev.SourceReady, image=IMAGE, rss_bytes=21_504_000),
        at(12, ev.TargetReady, image=IMAGE),
        at(13, ev.Prepared),
        at(400, ev.PreDumped, round=1, pages=5159, took_ms=380.25),
        at(450, ev.PreDumped, round=2, pages=5, took_ms=45.5),
        at(452, ev.Armed, clients=2),
        at(454, ev.MigrateSent, clients=2),
        at(457, ev.AckSeen, client="car-0123456789abcdef", after_ms=2.75),
        at(459, ev.AckSeen, client="car-2", after_ms=4.5),
        at(460, ev.Quiesced, acks=2, clients=2, ready=1, closed=1),
        at(462, ev.SourceHeld, waited_ms=9.5),
        at(488, ev.Dumped, pages=5, image_bytes=20_971_520, took_ms=25.5, pipes={"1": "pipe:[1]"}),
    ]


def completed() -> list[ev.AnyEvent]:
    return [
        *until_dumped(),
        at(508, ev.Restored, took_ms=19.5),
        at(509, ev.Committed),
        at(514, ev.Resumed, took_ms=4.5, queued=1320, restore_ms=18.04),
        at(515, ev.SourceGone, frozen_ms=20.12),
        at(513, ev.Adopted, outcome="moved", still_ms=51.5),
        at(540, ev.ClientArrived, client="car-0123456789abcdef", source="wrapper", interruption_ms=56.25),
        at(541, ev.ClientArrived, client="car-2", source="application", interruption_ms=61.5),
        at(541, ev.Completed, arrived=2),
    ]


def rolled_back() -> list[ev.AnyEvent]:
    return [
        *until_dumped()[:-1],
        at(480, ev.CheckpointFailed, verb="dump", attempt=1, error=TOLD),
        at(481, ev.TargetCleared),
        at(490, ev.SourceBack),
        at(491, ev.RolledBack, reason=TOLD),
    ]


LOGS = {"completed": completed, "rolled_back": rolled_back, "under_way": until_dumped}


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def printed(print_it: Callable[[Output], None], *, width: int | None = 80, as_json: bool = False) -> list[str]:
    """The lines on standard output, on a terminal ``width`` columns wide, or in a pipe when None."""
    file = Terminal() if width else io.StringIO()
    out = Output(as_json=as_json, out=file, err=io.StringIO())
    if width:
        out.console.width = width
    print_it(out)
    return file.getvalue().splitlines()


def replayed(log: list[ev.AnyEvent]) -> Callable[[Output], None]:
    return lambda out: show_replay(out, ID, entries(log), replay(log))


def narrated(log: list[ev.AnyEvent]) -> Callable[[Output], None]:
    def tell(out: Output) -> None:
        narrator = Narrator()
        for entry in entries(log):
            if done := narrator.feed(entry):
                out.line(*phase_line(done))
        out.line(describe.verdict(summarise(entries(log))))

    return tell


COMMANDS = (
    "up",
    "down",
    "clean",
    "doctor",
    "migrate",
    "cancel",
    "status",
    "services",
    "events",
    "replay",
    "export",
    "client",
)
STATUS = [
    MigrationStatus(
        id=ID, service="echo", source=A, target=B, epoch=3, phase="dumping", requested_ms=0, acks=2, clients=12
    ),
    MigrationStatus(
        id="m1",
        service="telemetry-gateway",
        source=A,
        target=B,
        epoch=2,
        phase="ended",
        outcome="rolled_back",
        requested_ms=0,
        reason=TOLD,
    ),
]
SERVICES = ServicesReply(
    services=[
        Placement(service="echo", place=A, epoch=2, migration=ID),
        Placement(service="telemetry-gateway", place=B),
    ],
    berths=[
        Berth(
            node=place.node,
            berth=place.berth,
            service="telemetry-gateway",
            address=place.address,
            port=4242,
            occupied=place is A,
            container="c" * 64,
            image=IMAGE,
            seen_ms=0,
        )
        for place in (A, B)
    ],
)


def timed(log: list[ev.AnyEvent]) -> Callable[[Output], None]:
    return lambda out: show(out, entries(log))


SCREENS: dict[str, Callable[[Output], None]] = {
    **{f"events {name}": timed(log()) for name, log in LOGS.items()},
    **{f"replay {name}": replayed(log()) for name, log in LOGS.items()},
    **{f"migrate {name}": narrated(log()) for name, log in LOGS.items()},
    "status": lambda out: show_status(out, STATUS, 90_000),
    "services": lambda out: show_services(out, SERVICES, 2_000),
}


@pytest.mark.parametrize("screen", SCREENS)
def test_it_fits_80_columns(screen: str) -> None:
    lines = printed(SCREENS[screen])
    assert lines
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("screen", SCREENS)
def test_a_narrow_terminal_loses_no_text(screen: str) -> None:
    wide = "".join("".join(printed(SCREENS[screen], width=None)).split())
    narrow = "".join("".join(printed(SCREENS[screen], width=60)).split())
    assert sorted(wide) == sorted(narrow)


@pytest.mark.parametrize("screen", SCREENS)
def test_without_colour_there_is_no_escape_sequence(screen: str) -> None:
    assert "\x1b" not in "".join(printed(SCREENS[screen], width=None))


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], *([command] for command in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([*command, "--help"])
        assert ended.value.code == 0
        help_text = capsys.readouterr().out
        assert [line for line in help_text.splitlines() if len(line) > 80] == []


def test_in_a_pipe_an_entry_is_one_line() -> None:
    lines = printed(SCREENS["events completed"], width=None)
    for event in completed():
        name = ev.kind(event).partition(".")[2]
        assert any(name in line and describe.details(event) in line for line in lines), name


def test_the_path_from_freeze_to_resume_is_marked() -> None:
    marked = [line for line in printed(SCREENS["events completed"]) if line.startswith("┃")]
    assert [line.split()[-1] for line in marked if "standstill" not in line]
    kinds = [ev.kind(moment.event) for moment in moments(entries(completed())) if moment.critical]
    assert kinds == [
        "checkpoint.held",
        "checkpoint.dumped",
        "restore.restored",
        "decision.committed",
        "restore.resumed",
    ]
    assert "52 ms = dump 26 + restore 20 + commit 1 + resume 5" in marked[-1]


def test_a_way_back_is_marked_until_the_source_serves() -> None:
    kinds = [ev.kind(moment.event) for moment in moments(entries(rolled_back())) if moment.critical]
    assert (kinds[0], kinds[-1]) == ("checkpoint.held", "checkpoint.aborted")


def test_without_a_freeze_nothing_is_marked() -> None:
    assert not any(moment.critical for moment in moments(entries(until_dumped()[:5])))


def test_a_silence_is_a_line_and_a_late_entry_makes_none() -> None:
    text = "\n".join(printed(SCREENS["events completed"]))
    assert text.count("nothing for 387 ms") == 1
    assert text.count("nothing for") == 1
    placed = moments(entries(completed()))
    late = next(moment for moment in placed if isinstance(moment.event, ev.Adopted))
    assert (late.offset_ms, late.delta_ms) == (513, 0)


def test_phases_and_verdict() -> None:
    lines = printed(SCREENS["migrate completed"])
    assert [line.split()[:3] for line in lines[:-1]] == [
        ["preparing", "13", "ms"],
        ["pre_copying", "437", "ms"],
        ["arming", "2", "ms"],
        ["dumping", "36", "ms"],
        ["restoring", "20", "ms"],
        ["committing", "1", "ms"],
        ["resuming", "6", "ms"],
        ["settling", "26", "ms"],
    ]
    assert lines[-1] == "completed in 541 ms: interruption 59 ms, acks 2/2, frozen 20 ms, restore 18 ms"


def test_json_is_one_object_a_line_and_ends_with_the_result() -> None:
    records = [json.loads(line) for line in printed(SCREENS["events completed"], as_json=True)]
    assert [record["event"]["kind"] for record in records[:-1]] == [ev.kind(event) for event in completed()]
    assert records[0]["seq"] == 100
    assert records[-1]["result"]["outcome"] == "completed"
    records = [json.loads(line) for line in printed(SCREENS["replay under_way"], as_json=True)]
    assert records[-1]["result"]["differences"] == 0
    assert records[-1]["result"]["outstanding"][0] == {"command": "call", "agent": "restore", "verb": "restore"}


def test_what_others_wrote_does_not_drive_the_terminal() -> None:
    evil = ErrorBody(code="criu_failed", message="\x1b]0;pwned\x07\x1b[2J[bold]x[/bold] :boom:\r\nsecond")
    log = [*until_dumped()[:-1], at(480, ev.CheckpointFailed, verb="dump", attempt=1, error=evil)]
    text = "\n".join(printed(timed(log)))
    assert not {"\x1b", "\x07", "\r"} & set(text)
    assert "[bold]" in text


def test_an_error_says_what_to_do() -> None:
    err = io.StringIO()
    Output(out=io.StringIO(), err=err).error(FerryError("no_target", "There is none.", hint="Make one.", path="$.to"))
    assert err.getvalue() == "error: There is none. (at $.to)\n  what to do: Make one.\n  code: no_target\n"


def test_a_long_error_is_wrapped_on_a_terminal() -> None:
    err = Terminal()
    out = Output(out=io.StringIO(), err=err)
    out.errors.width = 80
    out.error(FerryError("internal", "word " * 40, hint="hint " * 40))
    lines = err.getvalue().splitlines()
    assert len(lines) > 5
    assert max(len(line) for line in lines) <= 80


def test_an_error_as_json() -> None:
    out, err = io.StringIO(), io.StringIO()
    Output(as_json=True, out=out, err=err).error(FerryError("no_target", "There is none."))
    assert json.loads(err.getvalue()) == {"error": {"code": "no_target", "message": "There is none."}}
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (20.12, "20.1 ms"), (20.0, "20 ms"), (99.96, "100.0 ms"), (1234.5, "1,234 ms")],
)
def test_milliseconds(value: float, text: str) -> None:
    assert describe.ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (20_971_520, "20.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes(value: int, text: str) -> None:
    assert describe.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(-5, "0 s"), (61, "1 min"), (7200, "2 h"), (90_000, "1 d")])
def test_ages(value: float, text: str) -> None:
    assert describe.age(value) == text


@pytest.mark.parametrize(
    ("shared", "said"), [(0, "20.5 MiB resident"), (20 << 20, "20.5 MiB resident (20.0 MiB shared)")]
)
def test_memory_that_is_not_copied_is_told(shared: int, said: str) -> None:
    event = at(9, ev.SourceReady, image=IMAGE, rss_bytes=21_504_000, shared_bytes=shared)
    assert said in describe.details(event)
