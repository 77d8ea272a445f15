"""The command line itself: flags, errors, exit codes, and a document that keeps up with them."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from quicferry.cli import client, exits, logfile, main, project
from quicferry.cli.exits import Exit
from quicferry.cli.migrate import options
from quicferry.host.compose import Stack
from quicferry.protocol import events as ev
from quicferry.protocol.api import Options
from quicferry.protocol.errors import FerryError
from tests.unit.test_cli_output import COMMANDS, ID, at, completed, entries, rolled_back

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "cli.md").read_text()


def parse(*arguments: str) -> argparse.Namespace:
    return main.build_parser().parse_args(arguments)


def exported(tmp_path: Path, log: list[ev.AnyEvent]) -> str:
    path = tmp_path / "log.jsonl"
    logfile.write(path, ID, entries(log), force=True)
    return str(path)


def test_the_document_has_the_exit_codes() -> None:
    assert exits.markdown() in DOCUMENT
    assert set(exits.MEANING) == set(Exit)


def test_the_document_has_every_command_and_flag() -> None:
    parser = main.build_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(COMMANDS) <= set(commands.choices)
    for name, sub in commands.choices.items():
        assert f"### {name}" in DOCUMENT, name
        section = DOCUMENT.partition(f"### {name}")[2].partition("\n### ")[0]
        everywhere = DOCUMENT.partition("## Everywhere")[2].partition("\n## ")[0]
        for action in sub._actions:
            flags = [flag for flag in action.option_strings if flag.startswith("--") and flag != "--help"]
            assert all(f"`{flag}" in section or f"`{flag}" in everywhere for flag in flags), (name, flags)


def test_the_document_has_the_environment() -> None:
    for names in main.ENVIRONMENT:
        for name in names.split(", "):
            assert f"`{name}`" in DOCUMENT


def test_flags_before_or_after_the_command() -> None:
    before = parse("--json", "--nats", "nats://x:1", "-v", "status")
    after = parse("status", "--json", "--nats", "nats://x:1", "-v")
    assert vars(before) == vars(after)
    assert (before.json, before.nats, before.verbose) == (True, "nats://x:1", 1)
    assert (parse("status").json, parse("status").nats, parse("status").verbose) == (False, None, 0)


def test_limits_not_given_are_left_to_the_protocol() -> None:
    assert options(parse("migrate")) == Options()
    given = parse("migrate", "echo", "--pre-copy", "2", "--ack-timeout-ms", "0", "--settle-timeout-ms", "9")
    assert options(given) == Options(pre_copy_rounds=2, ack_timeout_ms=0, settle_timeout_ms=9)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["nope"],
        ["migrate", "a b"],
        ["migrate", "x" * 65],
        ["migrate", "--to", "a/b/c"],
        ["migrate", "--to", "../b"],
        ["migrate", "--pre-copy", "9"],
        ["migrate", "--pre-copy", "two"],
        ["migrate", "--timeout", "0"],
        ["migrate", "--timeout", "nan"],
        ["migrate", "--ack-timeout-ms", "-1"],
        ["migrate", "--det"],
        ["status", "--limit", "101"],
        ["cancel"],
        ["cancel", "m.*"],
        ["export"],
        ["events"],
        ["events", "a", "b"],
        ["up", "--frobnicate"],
    ],
)
def test_a_wrong_command_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(wrong) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "code: usage" in captured.err
    assert main.main([*wrong, "--json"]) == Exit.USAGE
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "usage"


def test_json_after_two_dashes_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", "--nope", "--", "--json"]) == Exit.USAGE
    assert capsys.readouterr().err.startswith("error: ")


def test_events_and_replay_of_a_file_need_no_nats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(tmp_path, completed())
    assert main.main(["events", path]) == Exit.DONE
    assert "as clients saw it" in capsys.readouterr().out
    assert main.main(["replay", path, "--json"]) == Exit.DONE
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]
    assert (result["outcome"], result["differences"]) == ("completed", 0)


def test_a_forged_decision_ends_with_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = [*rolled_back()[:-1], at(491, ev.Committed)]
    path = exported(tmp_path, forged)
    assert main.main(["replay", path]) == Exit.DIFFERS
    captured = capsys.readouterr()
    assert "DIFFERS" in captured.out
    assert "code: replay_differs" in captured.err
    assert main.main(["replay", path, "--json"]) == Exit.DIFFERS
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["result"]["differences"] == 1
    assert json.loads(captured.err)["error"]["code"] == "replay_differs"


@pytest.mark.parametrize("command", ["events", "replay"])
def test_a_log_without_its_request(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([command, exported(tmp_path, completed()[1:])]) == Exit.ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "code: log_unreadable" in captured.err


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["events", "./not-there.jsonl"]) == Exit.ERROR
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["events", "replay"])
def test_a_file_that_can_not_be_looked_for(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(path: Path, **_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    assert main.main([command, "x" * 300]) == Exit.ERROR  # no file system has names so long
    assert "code: file_refused" in capsys.readouterr().err
    monkeypatch.setattr(Path, "exists", denied)  # who is root may enter every folder
    assert main.main([command, "locked/log.jsonl", "--nats", "nats://127.0.0.1:1"]) == Exit.ERROR
    assert "locked/log.jsonl can't be read: Permission denied." in capsys.readouterr().err
    assert main.main([command, "m1", "--nats", "nats://127.0.0.1:1"]) == Exit.ERROR  # it can still be an id
    assert "code: nats_unreachable" in capsys.readouterr().err


def test_a_defect_shows_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> NoReturn:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("quicferry.cli.history.load", broken)
    assert main.main(["events", "m1"]) == Exit.ERROR
    captured = capsys.readouterr()
    assert "ZeroDivisionError: oops" in captured.err
    assert "Traceback" not in captured.err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("quicferry.cli.history.load", interrupted)
    assert main.main(["events", "m1"]) == Exit.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def run(*arguments: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quicferry.cli.main", *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=30, check=False, **keywords)  # type: ignore


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "quicferry.cli.main", "events", exported(tmp_path, completed())],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (Exit.BROKEN_PIPE, b"")


def test_a_terminal_without_utf8_gets_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("events", exported(tmp_path, completed()), env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_standard_input(tmp_path: Path) -> None:
    text = Path(exported(tmp_path, completed())).read_text()
    assert run("replay", "-", input=text).returncode == 0
    assert run("replay", "-", input=text[:-20]).returncode == Exit.ERROR


def test_standard_input_that_can_not_be_read(tmp_path: Path) -> None:
    with (tmp_path / "written").open("w") as file:
        for_writing = run("events", "-", stdin=file)
    closed = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m quicferry.cli.main events - <&-"],
        text=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    for done in (for_writing, closed):
        assert (done.returncode, done.stdout) == (Exit.ERROR, "")
        assert "code: file_refused" in done.stderr


def test_a_disk_that_is_full_is_no_defect(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "quicferry.cli.main", "events", exported(tmp_path, completed())]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert done.returncode == Exit.ERROR
    assert done.stderr.startswith("error: The output can't be written: No space left on device.\n  what to do: ")
    assert done.stderr.endswith("code: file_refused\n")


def test_a_file_that_nobody_thought_of_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_only(*_: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/checkout/.cache")

    monkeypatch.setattr("quicferry.cli.history.load", read_only)
    assert main.main(["events", "m1"]) == Exit.ERROR
    said = capsys.readouterr().err
    assert "/checkout/.cache can't be used: Read-only file system." in said
    assert "code: file_refused" in said


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_output_gets_nothing(closed: str, tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m quicferry.cli.main events {exported(tmp_path, completed())} {closed}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (Exit.DONE, "")
    assert bool(done.stdout) == (closed == "2")


def test_a_name_that_is_no_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--json"]):
        assert main.main([*flags, "events", os.fsdecode(b"\xff.jsonl")]) == Exit.ERROR
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["code"] == "file_refused"


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("quicferry ")


# Where the project is, and what the client is started with.


def a_project(folder: Path) -> Path:
    folder.mkdir()
    (folder / "compose.yaml").write_text("labels: {io.quicferry: '1'}\n")
    return folder.resolve()


def test_the_project_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, named, flagged = (a_project(tmp_path / name) for name in ("here", "named", "flagged"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "compose.yaml").write_text("services: {}\n")
    monkeypatch.setenv("QUICFERRY_PROJECT", str(named))
    monkeypatch.chdir(here)
    assert project.directory(parse("up")).resolve() == here
    assert project.directory(parse("up", "--project", str(flagged))) == flagged
    monkeypatch.chdir(other)
    assert project.directory(parse("up")) == named
    monkeypatch.delenv("QUICFERRY_PROJECT")
    assert project.directory(parse("up")) == ROOT
    with pytest.raises(FerryError, match="from --project, is no quicferry project"):
        project.directory(parse("up", "--project", str(other)))


def test_a_project_that_can_not_be_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for nowhere in ("~nobody-of-that-name/x", str(tmp_path / "loop"), "x" * 300):
        with pytest.raises(FerryError, match="is no quicferry project"):
            project.directory(parse("up", "--project", nowhere))
    monkeypatch.delenv("QUICFERRY_PROJECT", raising=False)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert project.directory(parse("up")) == ROOT


def test_the_client_s_own_help() -> None:
    done = run("client", "--project", str(ROOT), "--", "--help")
    assert done.returncode == 0
    assert "usage: car_client" in done.stdout


def test_a_certificate_that_may_not_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quicferry.host.command.run", lambda *_, **__: "/" + "x" * 300)
    with pytest.raises(FerryError) as caught:
        client.find_cafile(Stack(ROOT))
    assert caught.value.code == "file_refused"


def test_what_the_client_is_started_with(tmp_path: Path) -> None:
    args = parse("client", "--json", "--", "--interval-ms", "5", "--help")
    command, environment = client.command_line(
        args, tmp_path, "[::1]:14243", "/ca.pem", {"PYTHONPATH": "/x", "A": "b"}
    )
    assert command[:3] == [sys.executable, "-m", "services.car_client"]
    assert command[3:] == ["--cafile", "/ca.pem", "--json", "--interval-ms", "5", "--help"]
    assert environment == {"A": "b", "TRANSPARENT": "1", "TARGET_ADDR": "[::1]:14243", "PYTHONPATH": f"{tmp_path}:/x"}
