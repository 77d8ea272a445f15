"""Files that a command writes when it is done: looked at before it begins, or what it measured would be lost."""

from __future__ import annotations

import os
from pathlib import Path

from quicferry.protocol.errors import FerryError


def check(path: Path) -> None:
    """Whether a file can be written there; leaves everything as it was. Raises FerryError ``file_refused``."""
    try:
        there = os.path.lexists(path)
        if there and not (path.is_file() or path.is_dir()):
            return  # a device or a pipe: only writing tells, and whoever reads a pipe would see its end
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise _refused(path, error) from None


def write(path: Path, content: bytes) -> None:
    """Raises FerryError ``file_refused``."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _refused(path, error) from None


def read_text(path: Path) -> str:
    """Raises FerryError ``file_refused``."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _refused(path, error, "read") from None
    except UnicodeDecodeError:
        raise FerryError("file_refused", f"{path} can't be read: it is no UTF-8.", hint=_HINT) from None


def _refused(path: Path, error: OSError, what: str = "written") -> FerryError:
    return FerryError("file_refused", f"{path} can't be {what}: {error.strerror or error}.", hint=_HINT)


_HINT = "Name a file that you may write, in a folder that is there."
