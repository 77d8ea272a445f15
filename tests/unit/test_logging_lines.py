"""Log lines: an event and its fields, plain unless asked for JSON, tracebacks kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from quicferry import logging as ours


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QUICFERRY_LOG", raising=False)
    monkeypatch.delenv("QUICFERRY_LOG_LEVEL", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def test_text_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    ours.configure("coordinator")
    structlog.get_logger().info("migration_ended", id="m1", took_ms=3.5, reason="two\nlines")
    structlog.get_logger().debug("not_shown")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert "migration_ended id=m1" in err
    assert "took_ms=3.5" in err


def test_what_others_say_of_themselves_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ours.configure()
    structlog.get_logger().info("client_refused", reason="\x1b[2Jgone")
    line = capsys.readouterr().err
    assert "\x1b[2J" not in line
    assert line.count("\n") == 1
    assert "gone" in line


def test_json_names_the_service(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICFERRY_LOG", "json")
    monkeypatch.setenv("QUICFERRY_LOG_LEVEL", "debug")
    ours.configure("coordinator")
    structlog.get_logger().debug("log_entry", id="m1")
    logging.getLogger("nats").warning("from a library")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["service"], line["level"]) for line in lines] == [
        ("log_entry", "coordinator", "debug"),
        ("from a library", "coordinator", "warning"),
    ]
    assert lines[0]["id"] == "m1"


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_is_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("QUICFERRY_LOG", form)
    ours.configure()
    try:
        raise RuntimeError("a defect")
    except RuntimeError:
        structlog.get_logger().exception("request_failed")
    err = capsys.readouterr().err
    assert "a defect" in err
    assert "RuntimeError" in err
