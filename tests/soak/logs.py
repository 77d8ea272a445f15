"""What no log of ours may say, whatever fails around it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

DEFECTS: Final = re.compile(
    r"Traceback \(most recent call last\)"
    r"| (?:machine_failed|write_given_up|stream_handler_failed|on_quiesce_failed) "
    r"|was never (?:retrieved|awaited)"
    r"|Task was destroyed but it is pending"
)
"""A defect's traceback, something given up for good, or a task that nobody looked after."""
EXCUSED: Final = ("quicferry/faults.py", "in _process_pong")
"""In a traceback: what failed was made to; and nats-py's own, when the answer comes to a flush that was given up."""
STAMP: Final = re.compile(r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d", re.MULTILINE)
"""How the next line of a log begins."""


def defects(text: str) -> list[str]:
    """What a log says that it may not, each up to its next entry; a chain of tracebacks is one."""
    found: list[str] = []
    end = 0
    for match in DEFECTS.finditer(text):
        if match.start() >= end:
            begin = text.rfind("\n", 0, match.start()) + 1
            # All of it, and what it was the cause of: what excuses it may be far from where it begins.
            stamp = STAMP.search(text, match.end())
            end = stamp.start() if stamp else len(text)
            if not any(excuse in text[begin:end] for excuse in EXCUSED):
                found.append(text[begin:end].strip())
    return found


class Logs:
    """The log files of a folder, each read once, as it grows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def news(self) -> list[str]:
        """What they say by now that they may not, and did not say before."""
        found = []
        for path in sorted(self._folder.glob("*.log")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
                self._read[path] = file.tell()
            found += [f"{path.name}: {defect}" for defect in defects(text.decode(errors="replace"))]
        return found
