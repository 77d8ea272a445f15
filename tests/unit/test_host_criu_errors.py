"""CRIU's messages: which lines are shown, and what to do about those we know."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quicferry.host import criu_errors


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("(00.012) Error (criu/vdso.c:401): vdso: Unexpected rt vDSO area bounds", "CRIU 4.2.1"),
        ("(00.012) Error (criu/sockets.c:500): Can't get 1:16 opt: Operation not supported", "CRIU 4.2.1"),
        ("(00.020) Error (criu/cr-restore.c:1230): Can't fork for 5000: File exists", "PID 1 must reap"),
        ("(00.009) Error (criu/sk-inet.c:200): Connected TCP socket, consider using --tcp-established", "quiesce"),
        ("(00.009) Error (criu/files-reg.c:1790): Can't lookup mount=42 for fd=0 path=/null", "redirected inside"),
        ("(00.030) Error (criu/files-reg.c:2175): File usr/bin/x has bad size 5 (expect 6)", "same image"),
        ("(00.030) Error (criu/pagemap.c:203): Missing 7f0 in parent pagemap", "pre_copy_rounds 0"),
        ("(00.030) Error (criu/pstree.c:1): Can't dump a pid namespace without the process init", "pid: host"),
    ],
)
def test_known_messages_come_with_what_to_do(line: str, says: str) -> None:
    error = criu_errors.failure("dump", [line])
    assert error.code == "criu_failed"
    assert line in error.message
    assert says in error.hint


def test_an_unknown_message_comes_with_how_to_learn_more() -> None:
    assert "QUICFERRY_CRIU_LOG_LEVEL" in criu_errors.failure("restore", ["Error: never seen before"]).hint


def test_the_same_words_are_said_once() -> None:
    error = criu_errors.failure("dump", ["Error: x", "Error: y"], "Error: x")
    assert error.message == "CRIU's dump failed: Error: x | Error: y"


def test_errors_are_preferred_and_bounded() -> None:
    lines = ["(00.1) fine", *(f"(00.{n}) Error (a.c:{n}): no {n} {'x' * 1000}" for n in range(50)), "(00.9) bye"]
    shown = criu_errors.important(lines)
    assert len(shown) == criu_errors.MAX_LINES
    assert shown[0].startswith("(00.0) Error")
    assert max(map(len, shown)) == 300
    assert criu_errors.important(["one", "", "two"]) == ["one", "two"]


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    (tmp_path / "dump.log").write_bytes(b"Error: early\n" + b"x" * criu_errors.TAIL_BYTES + b"\nError: late\xff\n")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert criu_errors.tail(folder, "dump.log") == ["Error: late\N{REPLACEMENT CHARACTER}"]
        assert criu_errors.tail(folder, "none.log") == []
    finally:
        os.close(folder)
