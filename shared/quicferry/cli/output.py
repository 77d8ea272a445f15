"""What the command prints: text for a person, plain lines for a pipe, JSON when asked."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TextIO

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quicferry.protocol.errors import FerryError

PIPE_WIDTH: Final = 100_000
"""Nothing is folded in a pipe: one record stays one line."""

GAP: Final = 2
"""Spaces between two columns."""
LEAST_WIDTH: Final = 6
"""A column is not folded to less than this."""


class Cell(msgspec.Struct, frozen=True):
    """A piece of text with a rich style."""

    text: str
    style: str = ""


Row = Sequence[str | Cell]


class Output:
    """Standard output and standard error of one run.

    With ``as_json`` standard output carries JSON only, one object a line, and an error is one object on
    standard error. NO_COLOR and TERM=dumb are honoured.
    """

    def __init__(self, *, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.as_json = as_json
        self.console = _console(out or sys.stdout)
        self.errors = _console(err or sys.stderr)

    @property
    def live(self) -> bool:
        """Whether there is a terminal to draw progress on."""
        return not self.as_json and self.console.is_terminal and not self.console.is_dumb_terminal

    def record(self, record: Any) -> None:
        """One JSON object on a line of its own; takes structs and plain data."""
        self.console.file.write(_json(record) + "\n")
        self.console.file.flush()

    def line(self, *parts: str | Cell) -> None:
        """One line for a person; silent with ``as_json``. Words wrap on a terminal."""
        if self.as_json:
            return
        self.console.print(_text(parts))
        self.console.file.flush()

    def table(
        self, headings: Sequence[str], rows: Iterable[Row], *, right: Sequence[int] = (), keep: int | None = None
    ) -> None:
        """Columns for a person; silent with ``as_json``. On a terminal what does not fit is folded, never cut.

        ``right`` numbers the columns that are set flush right, ``keep`` the one that is folded last.
        """
        if self.as_json:
            return
        filled = [[_text([cell]) for cell in row] for row in rows]
        columns = [max([len(heading), *(row[n].cell_len for row in filled)]) for n, heading in enumerate(headings)]
        widths = fit(columns, self.console.width - GAP * (len(headings) - 1), keep)
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim", show_header=any(headings))
        for number, (heading, width) in enumerate(zip(headings, widths, strict=True)):
            side: Literal["right", "left"] = "right" if number in right else "left"
            table.add_column(heading, justify=side, overflow="fold", width=width)
        for row in filled:
            table.add_row(*row)
        with self.console.capture() as capture:
            self.console.print(table)
        for text in capture.get().splitlines():
            self.console.file.write(text.rstrip() + "\n")
        self.console.file.flush()

    def error(self, error: FerryError) -> None:
        """What went wrong, what to do and the code to look up, on standard error."""
        if self.as_json:
            self.errors.file.write(_json({"error": error.body()}) + "\n")
            return
        where = f" (at {error.path})" if error.path else ""
        self._error_line("error: ", f"{error.message}{where}", style="bold red")
        if error.hint:
            self._error_line("  what to do: ", error.hint)
        self._error_line("  code: ", error.code)

    def note(self, text: str) -> None:
        """A remark on standard error, which is no part of the result; silent with ``as_json``."""
        if not self.as_json:
            self._error_line("", text)

    def _error_line(self, label: str, text: str, style: str = "") -> None:
        text = printable(text)
        lines = [text]
        if self.errors.is_terminal:
            lines = textwrap.wrap(text, max(self.errors.width - len(label), 20)) or [""]
        for number, part in enumerate(lines):
            head = Text(label, style) if number == 0 else Text(" " * len(label))
            self.errors.print(head + Text(part), soft_wrap=True)
        self.errors.file.flush()


def fit(columns: Sequence[int], available: int, keep: int | None = None) -> list[int]:
    """Widths for columns of these natural widths: the widest give way, the one to ``keep`` last."""
    widths = list(columns)
    for last_resort in (False, True):
        while sum(widths) > available:
            giving = [n for n, width in enumerate(widths) if width > LEAST_WIDTH and (last_resort or n != keep)]
            if not giving:
                break
            widths[max(giving, key=lambda n: widths[n])] -= 1
    return widths


def printable(text: str) -> str:
    """``text`` with control characters made visible: what others wrote must not drive a terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _json(record: Any) -> str:
    try:
        return msgspec.json.encode(record).decode()
    except UnicodeEncodeError:  # a file's name that is no UTF-8: Python's surrogates, which the other one escapes
        return json.dumps(msgspec.to_builtins(record), separators=(",", ":"))


def _text(parts: Sequence[str | Cell]) -> Text:
    text = Text()
    for part in parts:
        cell = part if isinstance(part, Cell) else Cell(part)
        text.append(printable(cell.text), cell.style)
    return text


def _console(file: TextIO) -> Console:
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks, not a traceback
    plain = not file.isatty()
    width = PIPE_WIDTH if plain and "COLUMNS" not in os.environ else None
    # rich takes NO_COLOR to leave bold and dim; whoever sets it rarely means that.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(file=file, width=width, color_system=colours, highlight=False, markup=False, emoji=False)
