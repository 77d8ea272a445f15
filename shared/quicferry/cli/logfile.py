"""A migration's log in a file: newline-delimited JSON, written by ``export``, read by ``events`` and ``replay``.

The first line is a :class:`Header`, every other one a :class:`Line`. Reading is bounded and names the line at fault.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

from quicferry.protocol import events as ev
from quicferry.protocol import wire
from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import Count, Name

FORMAT: Final = 1
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
MAX_ENTRIES: Final = 100_000
MAX_LINE_BYTES: Final = wire.MAX_MESSAGE_BYTES


class Entry(NamedTuple):
    """One event and its sequence number in the log's stream."""

    seq: int
    event: ev.AnyEvent


class Header(msgspec.Struct, frozen=True, kw_only=True):
    quicferry_log: Count
    """The format's version."""
    id: Name
    entries: Count | None = None
    """How many lines follow; tells a file that was cut off."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    seq: Count
    event: ev.AnyEvent


def encode(migration: str, entries: Sequence[Entry]) -> Iterable[bytes]:
    """The file's lines, newlines included."""
    yield wire.encode(Header(quicferry_log=FORMAT, id=migration, entries=len(entries))) + b"\n"
    for entry in entries:
        yield wire.encode(Line(seq=entry.seq, event=entry.event)) + b"\n"


def write(path: Path, migration: str, entries: Sequence[Entry], *, force: bool) -> None:
    """Write the whole file or nothing; an existing one only with ``force``.

    Raises FerryError ``file_refused``.
    """
    try:
        if path.exists() and not force:
            raise FileExistsError
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.writelines(encode(migration, entries))
                file.flush()
                temporary.chmod(0o666 & ~_umask())
                if force:
                    temporary.replace(path)
                else:
                    os.link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise FerryError(
            "file_refused", f"{path} exists already.", hint="Name another file, or overwrite it with --force."
        ) from None
    except OSError as error:
        raise FerryError(
            "file_refused",
            f"{path} can't be written: {error.strerror or error}.",
            hint="Name another file with -o; without it the log goes to standard output.",
        ) from None


def read(path: Path | None) -> tuple[str, list[Entry]]:
    """A migration's id and entries from a file, or from standard input when ``path`` is None.

    Raises FerryError ``file_refused`` when it can't be opened and ``log_unreadable`` when it is no whole log.
    """
    name = "standard input" if path is None else str(path)
    try:
        if path is not None:
            with path.open("rb") as file:
                return _parse(file, name)
        if sys.stdin is None:  # Python's way to say that it was closed
            raise OSError(errno.EBADF, "it is closed")
        return _parse(sys.stdin.buffer, name)
    except OSError as error:
        raise FerryError(
            "file_refused",
            f"{name} can't be read: {error.strerror or error}.",
            hint="`quicferry export ID -o FILE` writes a log.",
        ) from None


def _parse(file: BinaryIO, name: str) -> tuple[str, list[Entry]]:
    header: Header | None = None
    entries: list[Entry] = []
    number = size = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        size += len(line)
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise _unreadable(f"{where}: longer than {MAX_LINE_BYTES} bytes.")
        if size > MAX_FILE_BYTES:
            raise _unreadable(f"{where}: the file is larger than {MAX_FILE_BYTES >> 20} MiB.")
        if not line.strip():
            continue
        if header is None:
            header = _header(line, where)
            continue
        entries.append(_entry(line, where, header, entries))
        if len(entries) > MAX_ENTRIES:
            raise _unreadable(f"{where}: the file has more than {MAX_ENTRIES} entries.")
    if header is None:
        raise _unreadable(f"{name} is empty.")
    if header.entries is not None and header.entries != len(entries):
        raise _unreadable(
            f"{name}, line {number}: the file was cut off or added to: its first line promises {header.entries} "
            f"entries, it has {len(entries)}."
        )
    if not entries:
        raise _unreadable(f"{name} has no entries.")
    return header.id, entries


def _header(line: bytes, where: str) -> Header:
    try:
        header: Header = wire.decode(line, Header)
    except FerryError as error:
        raise _unreadable(f"{where}: not the first line of an exported log. {error.message}") from None
    if header.quicferry_log != FORMAT:
        raise FerryError(
            "log_unreadable",
            f"{where}: the format is version {header.quicferry_log}; this quicferry reads version {FORMAT}.",
            hint="Read it with the version of quicferry that exported it.",
        )
    return header


def _entry(line: bytes, where: str, header: Header, before: Sequence[Entry]) -> Entry:
    try:
        entry: Line = wire.decode(line, Line)
    except FerryError as error:
        if not line.endswith(b"\n"):
            raise _unreadable(f"{where}: cut off in the middle of the line.") from None
        at = f" (at {error.path})" if error.path else ""
        raise _unreadable(f"{where}: {error.message}{at}") from None
    if entry.event.id != header.id:
        raise _unreadable(f"{where}: belongs to migration {entry.event.id}, not to {header.id}.")
    if before and entry.seq <= before[-1].seq:
        raise _unreadable(f"{where}: sequence number {entry.seq} does not follow {before[-1].seq}.")
    return Entry(entry.seq, entry.event)


def _unreadable(message: str) -> FerryError:
    return FerryError("log_unreadable", message, hint="Export it again with `quicferry export ID -o FILE`.")


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def looks_like_id(text: str) -> bool:
    """Whether ``text`` has the form of a migration's id."""
    with contextlib.suppress(msgspec.ValidationError):
        msgspec.convert(text, Name)
        return True
    return False
