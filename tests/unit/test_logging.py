"""Logs: one write a line, and a reader that goes away costs nothing but the log."""

from __future__ import annotations

import io
import os
import sys

import pytest
import structlog

from quicferry import logging


class Counting(io.StringIO):
    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


def test_a_line_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Counting()
    monkeypatch.setattr(sys, "stderr", stream)
    logging.configure("test")
    structlog.get_logger().info("something_happened", id="m1")
    assert stream.writes == 1
    assert "something_happened id=m1\n" in stream.getvalue()


def test_a_reader_that_is_gone_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        logging.configure("test")
        structlog.get_logger().info("nobody_reads")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # what is buffered can then be flushed at close
    structlog.get_logger().info("closed_by_now")
