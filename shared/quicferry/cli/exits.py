"""Exit codes: one table, from which ``--help`` and docs/cli.md are made."""

from __future__ import annotations

import enum
from typing import Final

from quicferry.protocol.errors import FerryError


class Exit(enum.IntEnum):
    """What the command's exit code says to a script."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    ROLLED_BACK = 3
    FAILED = 4
    STILL_RUNNING = 5
    DIFFERS = 6
    INTERRUPTED = 130
    BROKEN_PIPE = 141


MEANING: Final[dict[Exit, str]] = {
    Exit.DONE: "done; for migrate: completed; for cancel: asked",
    Exit.ERROR: "refused or not possible; the error's code says why",
    Exit.USAGE: "the command line is wrong",
    Exit.ROLLED_BACK: "migrate, cancel: rolled back, the server is where it was",
    Exit.FAILED: "migrate, cancel: failed; demo: something was lost or rebuilt",
    Exit.STILL_RUNNING: "migrate: not over within --timeout; it goes on",
    Exit.DIFFERS: "replay: the log's decisions differ from the machine's",
    Exit.INTERRUPTED: "interrupted by Ctrl-C; a migration asked for goes on",
    Exit.BROKEN_PIPE: "whoever read the output went away",
}

OUTCOMES: Final[dict[str, Exit]] = {
    "completed": Exit.DONE,
    "rolled_back": Exit.ROLLED_BACK,
    "failed": Exit.FAILED,
}
"""The exit code of each way that a migration can end."""


def epilog() -> str:
    """The table as plain text, at most 80 columns wide."""
    lines = [f"  {code.value:>3}  {meaning}" for code, meaning in MEANING.items()]
    return "\n".join(["exit codes:", *lines])


def markdown() -> str:
    """The table as it stands in docs/cli.md."""
    rows = [f"| {code.value} | {meaning} |" for code, meaning in MEANING.items()]
    return "\n".join(["| exit code | meaning |", "|---|---|", *rows])


class ExitError(FerryError):
    """An error that ends the command with an exit code of its own instead of 1."""

    def __init__(self, exit_code: Exit, code: str, message: str, *, hint: str = "", path: str = "") -> None:
        super().__init__(code, message, hint=hint, path=path)
        self.exit_code = exit_code
