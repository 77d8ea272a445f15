"""An exported log reads back as it was, or says which line is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quicferry.cli import logfile
from quicferry.protocol.errors import FerryError
from tests.unit.test_cli_output import ID, completed, entries

LOG = entries(completed())


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    logfile.write(path, ID, LOG, force=False)
    return path


def refused(path: Path) -> FerryError:
    with pytest.raises(FerryError) as caught:
        logfile.read(path)
    return caught.value


def test_there_and_back(exported: Path) -> None:
    assert logfile.read(exported) == (ID, LOG)
    first = json.loads(exported.read_text().splitlines()[0])
    assert first == {"quicferry_log": 1, "id": ID, "entries": len(LOG)}


def test_a_file_without_the_count_reads_too(exported: Path) -> None:
    lines = exported.read_text().splitlines(keepends=True)
    exported.write_text(
        json.dumps({"quicferry_log": 1, "id": ID, "later": "field"}) + "\n" + "".join(lines[1:]) + "\n"
    )
    assert logfile.read(exported) == (ID, LOG)


def test_an_existing_file_stays_without_force(exported: Path) -> None:
    before = exported.read_bytes()
    with pytest.raises(FerryError, match="exists already"):
        logfile.write(exported, ID, LOG[:3], force=False)
    assert exported.read_bytes() == before
    logfile.write(exported, ID, LOG[:3], force=True)
    assert logfile.read(exported) == (ID, LOG[:3])
    assert list(exported.parent.iterdir()) == [exported]


def test_no_folder_no_half_file(tmp_path: Path) -> None:
    with pytest.raises(FerryError, match="can't be written") as caught:
        logfile.write(tmp_path / "none" / "log", ID, LOG, force=False)
    assert caught.value.code == "file_refused"
    assert list(tmp_path.iterdir()) == []


def _replace(number: int, line: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "empty": (lambda lines: [], "is empty"),
    "binary": (_replace(3, b"\x00\xff\xfe\x80\n"), "line 3"),
    "no header": (lambda lines: lines[1:], "line 1: not the first line"),
    "only a header": (lambda lines: [b'{"quicferry_log":1,"id":"m"}\n'], "no entries"),
    "newer": (_replace(1, b'{"quicferry_log":2,"id":"m"}\n'), "version 2"),
    "cut at a line": (lambda lines: lines[:-2], "cut off"),
    "cut in a line": (lambda lines: [*lines[:5], lines[5][:-9]], "line 6: cut off in the middle"),
    "added to": (lambda lines: [*lines, lines[-1].replace(b'"seq":160', b'"seq":161')], "added to"),
    "an unknown kind": (
        _replace(4, b'{"seq":106,"event":{"kind":"x.y","id":"m","at_ms":1}}\n'),
        "line 4: Invalid value",
    ),
    "a wrong field": (lambda lines: [*lines[:2], lines[2].replace(b'"at_ms":', b'"at_ms":"x')], "line 3"),
    "another's entry": (
        lambda lines: [*lines[:2], lines[2].replace(ID.encode(), b"other")],
        "migration other",
    ),
    "out of order": (lambda lines: [*lines[:3], lines[2]], "line 4: sequence number 103 does not follow 103"),
    "a huge line": (_replace(2, b'{"seq":1,' + b" " * logfile.MAX_LINE_BYTES + b"}\n"), "line 2: longer than"),
    "deep": (_replace(2, b'{"seq":1,"event":' + b"[" * 100_000 + b"\n"), "line 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_line(exported: Path, damage: str) -> None:
    change, says = DAMAGE[damage]
    exported.write_bytes(b"".join(change(exported.read_bytes().splitlines(keepends=True))))
    error = refused(exported)
    assert error.code == "log_unreadable"
    assert says in error.message
    assert error.hint


def test_a_huge_file_is_not_read_to_its_end(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "MAX_FILE_BYTES", 1024)
    assert "larger than" in refused(exported).message
    monkeypatch.undo()
    monkeypatch.setattr(logfile, "MAX_ENTRIES", 4)
    assert "more than 4 entries" in refused(exported).message


def test_what_is_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path).code == "file_refused"
    assert refused(tmp_path / "none").code == "file_refused"
