"""The benchmark's arithmetic: what many moves are summed up to, what a client's echoes tell, and the tables."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec
import pytest

from quicferry.bench import curves, facts, figures, tables
from quicferry.bench.ferry import phases
from quicferry.bench.figures import Machine, Move, Result, Throughput
from quicferry.bench.load import Load
from quicferry.bench.run import Plan, interleaved
from quicferry.bench.variant import Measured
from quicferry.cli import bench, main, results
from quicferry.cli.output import Output
from quicferry.host import command
from quicferry.protocol import events as ev
from quicferry.protocol.errors import FerryError


def a_move(gap_ms: float = 60.0, **more: object) -> Move:
    plain = {"sent": 100, "lost": 0, "handshakes": 0, "retransmissions": 0, "cwnd_before": 9000, "cwnd_after": 9000}
    return Move(gap_ms=gap_ms, **(plain | more))  # type: ignore[arg-type]


def a_result() -> Result:
    moves = [a_move(gap, frozen_ms=20.0, restore_ms=30.0, phases_ms={"dump": 21.0}) for gap in (55.0, 60.0, 75.0)]
    variant = figures.variant("what it is", moves, bulk=[Throughput(before=10.0, after=9.0)])
    point = figures.Point(
        x=1, moves=3, gap_ms=variant.gap_ms, floor_ms=None, gap_over_floor=None, image_mb=None, echoes_lost=0
    )
    machine = Machine(at="2026-01-01T00:00:00+00:00", kernel="6", cpu="x", cores=2, memory_mb=1, load=0, versions={})
    return Result(machine=machine, variants={"ferry": variant}, curves={"memory": [point]})


def test_percentiles_are_values_that_were_measured() -> None:
    one = figures.summary([float(number) for number in range(1, 101)])
    assert one is not None
    assert (one.median, one.p90, one.p99, one.max) == (50.5, 90.0, 99.0, 100.0)
    assert figures.summary([None, 3.0]) == figures.summary([3.0])
    assert figures.summary([None]) is None


def test_the_gap_is_divided_by_the_floor_of_the_same_move() -> None:
    moves = [
        a_move(60.0, frozen_ms=20.0, restore_ms=30.0),
        a_move(90.0, frozen_ms=40.0, restore_ms=20.0),
        a_move(1.0),
    ]
    over = figures.over_floor(moves)
    assert over is not None
    assert (over.median, over.max) == (1.35, 1.5)


def test_the_json_has_the_shape_that_was_promised() -> None:
    plain = msgspec.json.decode(figures.write(a_result()))
    variant = plain["variants"]["ferry"]
    assert set(plain) >= {"machine", "variants", "curves"}
    assert variant["moves"] == 3
    for name in ("gap_ms", "floor_ms", "gap_over_floor"):
        assert set(variant[name]) == {"median", "p90", "p99", "max"}
    assert (variant["echoes_lost"], variant["handshakes"]) == (0, 0)
    assert variant["phases_ms"]["dump"]["median"] == 21.0
    assert variant["throughput_ratio"]["median"] == 0.9
    assert msgspec.json.decode(figures.write(a_result()), type=Result) == a_result()


def test_the_gap_is_the_longest_silence_after_the_moves_begin() -> None:
    load = Load()
    load.sent = [0.0, 1.0, 1.1, 1.2, 1.3]
    load.echoed = {0: 0.1, 1: 1.01, 2: 1.11, 4: 1.5}  # the longest one, before 1.01, is none of the move's
    gap = load.gap(since=1.05)
    assert (gap.last_before, gap.first_after) == (1.11, 1.5)
    assert load.trace(since=1.05).points[-1] == (190.0, 200.0)


def test_phases_come_from_the_log() -> None:
    at = {"id": "m", "at_ms": 1_000}
    log: list[ev.AnyEvent] = [
        ev.AckSeen(**at, client="c", after_ms=2.0),
        ev.SourceHeld(**at, waited_ms=5.0),
        ev.Dumped(**at, pages=1, image_bytes=1, took_ms=20.0),
        ev.Restored(id="m", at_ms=1_032, took_ms=30.0),
        ev.Resumed(id="m", at_ms=1_040, took_ms=1.5, queued=1),
    ]
    found = phases(log, 1.042)
    assert found["ack"] == 2.0
    assert found["freeze"] == 3.0
    assert (found["dump"], found["restore"], found["adopt"]) == (20.0, 30.0, 1.5)
    assert (found["transfer"], found["first echo"]) == (2.0, 2.0)
    assert "commit" not in found


class Scripted:
    """A variant that does what it is told, in place of one that moves anything."""

    what = "scripted"

    def __init__(self, name: str, order: list[str], failures: int = 0) -> None:
        self.name = name
        self.failures = failures
        self.closed = 0
        self._order = order

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        self.closed += 1

    async def move(self, *, bulk: bool = False) -> Measured:
        self._order.append(self.name)
        if self.failures:
            self.failures -= 1
            raise FerryError("criu_failed", "told to")
        throughput = Throughput(before=1.0, after=1.0) if bulk else None
        return Measured(a_move(), throughput, figures.Trace(gap_ms=60.0, points=[]))


async def test_variants_take_turns_and_one_failure_is_told_and_made_up_for() -> None:
    order: list[str] = []
    said: list[str] = []
    variants = [Scripted("ferry", order), Scripted("floor", order, failures=1)]
    taken = await interleaved(variants, Plan(moves=2, bulk_moves=1), said.append)
    assert order == ["ferry", "floor", "floor", "ferry", "floor", "ferry"]
    assert any("told to; once more" in line for line in said)
    assert {name: len(one.moves) for name, one in taken.items()} == {"ferry": 2, "floor": 2}
    assert len(taken["ferry"].bulk) == 1
    # A result that left the failure out would show a way that always works.
    assert {name: len(one.summed().failed) for name, one in taken.items()} == {"ferry": 0, "floor": 1}


async def test_a_variant_that_keeps_failing_ends_the_run_and_all_are_closed() -> None:
    variants = [Scripted("ferry", []), Scripted("reconnect", [], failures=9)]
    with pytest.raises(FerryError, match=r"reconnect: .*told to"):
        await interleaved(variants, Plan(moves=1), lambda _: None)
    assert [variant.closed for variant in variants] == [1, 1]


def test_tables_go_between_the_marks_and_nowhere_else() -> None:
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    new = tables.insert(page, a_result())
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new  # noqa: PT018
    assert "| `ferry` | 3 | 0 | 60.0 | 75.0 | 75.0 | 75.0 | 20.0 | 30.0 | 1.20 |" in new
    assert tables.insert(new, a_result()) == new
    with pytest.raises(FerryError, match="no marks"):
        tables.insert("nothing here", a_result())


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    result = a_result()
    crowd = msgspec.structs.replace(result.curves["memory"][0], arrived=1)
    result = msgspec.structs.replace(result, curves={"connections": [crowd], "memory": [crowd]})
    width = 0
    for line in tables.markdown(result).splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_the_command_line() -> None:
    parser = main.build_parser()
    args = parser.parse_args(["bench", "--quick", "--variants", "ferry,floor", "--memory", "0"])
    plan = bench._plan(args)
    assert (plan.variants, plan.memory, plan.connections, plan.moves) == (("ferry", "floor"), (), (1, 10), 2)
    assert bench._plan(parser.parse_args(["bench"])).connections == (1, 10, 100, 500)
    for wrong in ("nope", "ferry,nope"):
        with pytest.raises(argparse.ArgumentTypeError, match="no variant"):
            bench._names(wrong)


def test_a_system_that_stays_gets_no_services_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    parser = main.build_parser()

    def plan(*arguments: str) -> Plan:
        args = parser.parse_args(["bench", "--quick", *arguments])
        return bench._lasting_nothing(args, bench._plan(args), Output())

    unasked = plan()
    assert (unasked.memory, unasked.variants) == ((), ("ferry", "source-order", "reconnect", "podman", "floor"))
    said = capsys.readouterr().err
    assert "--memory" in said
    assert "--variants" in said
    asked = plan("--memory", "20", "--variants", "ferry,copied")
    assert (asked.memory, asked.variants) == ((20,), ("ferry", "copied"))
    assert capsys.readouterr().err == ""


class Stuck:
    """Has no end, by a time limit that says nothing."""

    name = what = "stuck"
    cafile = ""

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def move(self, *, bulk: bool = False) -> Measured:
        raise TimeoutError


async def test_a_move_without_an_end_is_told_as_one() -> None:
    said: list[str] = []
    with pytest.raises(FerryError, match="did not come to its end: no end in time") as caught:
        await curves.connections(cast(Any, Stuck()), (1,), 1, said.append)
    assert caught.value.code == "setup_failed"
    with pytest.raises(FerryError, match="stuck: no end in time"):
        await interleaved([Stuck()], Plan(moves=1, bulk_moves=0), said.append)
    assert said == ["stuck: no end in time; once more"]


def test_a_library_without_metadata_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that was never installed, or podman-compose from the distribution."""

    def missing(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr("quicferry.bench.facts.attempt", lambda *_, **__: command.Result(127, "", ""))
    assert set(facts.machine(tmp_path, {}).versions) == {"python on the host"}


NOWHERE = "/nonexistent/folder/file"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["bench", "--json", NOWHERE], "file_refused"),
        (["bench", "--json", "/"], "file_refused"),
        (["bench", "--json", "x" * 300], "file_refused"),
        (["bench", "--into", NOWHERE], "file_refused"),
        (["bench", "--into", sys.executable], "file_refused"),
        (["bench", "--into", __file__], "bad_settings"),
        (["bench", "--plots", "/dev/null/plots"], "file_refused"),
        (["demo", "--json", NOWHERE], "file_refused"),
        (["demo", "--json", "/"], "file_refused"),
    ],
)
def test_what_can_not_be_written_is_said_before_anything_is_measured(
    arguments: list[str], code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun(*_: object) -> NoReturn:
        raise AssertionError("it has begun")

    monkeypatch.setattr("quicferry.cli.lifecycle.stack", begun)
    assert main.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"code: {code}" in said
    assert "what to do: " in said


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    results.check(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("kept")
    results.check(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
    results.check(Path("/dev/stdout"))


def test_a_result_that_can_not_be_written_in_the_end_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "result.json"
    earlier.write_bytes(figures.write(a_result()))
    assert main.main(["bench", "--report", str(earlier), "--json", "/dev/full"]) == 1
    captured = capsys.readouterr()
    assert msgspec.json.decode(captured.out, type=Result) == a_result()
    assert "No space left on device" in captured.err
    assert "The result is on standard output." in captured.err


def test_a_report_needs_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--report", "/nonexistent/result.json"]) == 1
    assert "no benchmark's result" in capsys.readouterr().err
    assert main.main(["bench", "--report", sys.executable]) == 1
    assert "no benchmark's result" in capsys.readouterr().err
