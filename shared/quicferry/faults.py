"""Faults to order: named points, between every two steps of a move, at which a test lets a process fail.

Nothing of it is there unless ``QUICFERRY_FAULTS`` names a directory when the process starts. In that directory a file
with a point's name holds one of :data:`FAULTS`; who comes to the point takes the file away, and the fault strikes
once. If there is a file ``passed``, every point that is come to is added to it, one a line.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Final

from quicferry.protocol.errors import FerryError

VARIABLE: Final = "QUICFERRY_FAULTS"
PASSED: Final = "passed"
HANG_SECONDS: Final = 3600.0

FAULTS: Final[dict[str, str]] = {
    "kill": "SIGKILL to the process",
    "exit": "SIGTERM to the process, which then stops by itself",
    "stop": "SIGSTOP to the process, until somebody sends it SIGCONT",
    "hang": "what is under way never goes on, until it is cancelled",
    "error": "what is under way fails with a FerryError",
    "lost": "what is about to be sent is not",
    "twice": "what is about to be sent is sent twice",
}
_SIGNALS: Final = {"kill": signal.SIGKILL, "exit": signal.SIGTERM, "stop": signal.SIGSTOP}
_directory = os.environ.get(VARIABLE, "")


async def at(point: str) -> str:
    """Let what is planted at ``point`` strike. Returns ``lost`` and ``twice``, which are the caller's to do, or "".

    Raises FerryError ``internal`` for an ``error``.
    """
    if not _directory:
        return ""
    fault = strike(point)
    if fault == "hang":
        await asyncio.sleep(HANG_SECONDS)
    return fault


def strike(point: str) -> str:
    """The same where nothing can be awaited; ``hang`` is returned too."""
    if not _directory:
        return ""
    fault = _taken(point)
    if fault in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault])
        return ""
    if fault == "error":
        raise FerryError("internal", f"A fault was planted at {point}.", hint=f"{VARIABLE} is set: this is a test.")
    return fault


def _taken(point: str) -> str:
    path = os.path.join(_directory, point)
    passed = os.path.join(_directory, PASSED)
    if os.path.exists(passed):
        with open(passed, "a", encoding="utf-8") as file:
            file.write(point + "\n")
    try:
        with open(path, encoding="utf-8") as file:
            fault = file.read().strip()
        os.unlink(path)
    except FileNotFoundError:
        return ""
    return fault
