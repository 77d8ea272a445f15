"""The shared heap of a server: memory that moves by being mapped again instead of being copied.

A server started with the heap's library (containers/heap/heap.c) has its heap in one shared mapping of an unlinked
file. CRIU is told that it is external (``--external``, criu(8)) and notes only its name; at the restore it gets the
file by descriptor under that name (``--inherit-fd``). So the pages stay where they are, however many there are.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

MARK: Final = "/quicferry-heap (deleted)"
"""How the mapping of FILE_NAME in heap.c ends in proc_pid_maps(5), in whichever mount namespace."""


class Heap:
    """An open descriptor of the file, which keeps the pages while no process has them. Close it when done."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
        mount = int(next(line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:")))
        self.key = f"file[{mount:x}:{os.fstat(fd).st_ino:x}]"
        """CRIU's name for the file: its mount's id and its inode, which are the same seen from any process."""

    @classmethod
    def of(cls, pid: int) -> Heap | None:
        """The heap of process ``pid``; None if its heap is private or it is gone. Needs CAP_CHECKPOINT_RESTORE."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
                found = next(
                    (line.split()[0] for line in maps if " rw-s " in line and line.rstrip().endswith(MARK)), ""
                )
            if found:
                return cls(os.open(f"/proc/{pid}/map_files/{found}", os.O_RDWR | os.O_CLOEXEC))
        return None

    @property
    def size_bytes(self) -> int:
        """The memory it takes; untouched parts take none."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
