"""The shared heap of a server: memory that moves by being mapped again instead of being copied.

A server started with the heap's library (containers/heap/heap.c) has its heap in one shared mapping of an unlinked
file. CRIU is told that it is external (``--external``, criu(8)) and notes only its name; at the restore it gets the
file by descriptor under that name (``--inherit-fd``). So the pages stay where they are, however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from quicferry.host.processes import Process

MARK: Final = "/quicferry-heap (deleted)"
"""How the mapping of FILE_NAME in heap.c ends in proc_pid_maps(5), in whichever mount namespace."""

LOOKS: Final = 3
"""A server that serves may divide the mapping between two looks at it."""
HUGE_PAGE: Final = 2 << 20
COLLAPSE_SECONDS: Final = 1.0
"""Most time that one migration spends on making huge pages; what is left then is the next one's."""

_SYS_PROCESS_MADVISE: Final = 440
"""The same on every architecture (process_madvise(2))."""
_MADV_COLLAPSE: Final = 25


class _IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


_libc: Final = ctypes.CDLL(None, use_errno=True)


class Heap:
    """An open descriptor of the file, which keeps the pages while no process has them. Close it when done."""

    def __init__(self, fd: int, base: int) -> None:
        self.fd = fd
        self._base = base
        info = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
        mount = int(next(line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:")))
        self.key = f"file[{mount:x}:{os.fstat(fd).st_ino:x}]"
        """CRIU's name for the file: its mount's id and its inode, which are the same seen from any process."""

    @classmethod
    def of(cls, pid: int) -> Heap | None:
        """The heap of process ``pid``; None if its heap is private or it is gone. Needs CAP_CHECKPOINT_RESTORE."""
        for _ in range(LOOKS):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
                    ours = (line.split() for line in maps if " rw-s " in line and line.rstrip().endswith(MARK))
                    found = next(ours, None)
                if found is None:
                    return None
                # proc_pid_maps(5): range, permissions, offset into the file
                base = int(found[0].partition("-")[0], 16) - int(found[2], 16)
                return cls(os.open(f"/proc/{pid}/map_files/{found[0]}", os.O_RDWR | os.O_CLOEXEC), base)
        return None

    @property
    def size_bytes(self) -> int:
        """The memory it takes; untouched parts take none."""
        return os.fstat(self.fd).st_blocks * 512

    async def collapse(self, server: Process, *, limit: float) -> int:
        """Have the kernel put the heap of the running ``server`` into huge pages; how many were made or found.

        For ``limit`` seconds at most, and no longer than COLLAPSE_SECONDS. CRIU walks through the mappings page by
        page while the server is frozen, and the copy maps each anew when it first touches it: hundreds, or a dozen.
        Best effort (madvise(2), MADV_COLLAPSE, Linux 6.1): without room or right it stays as it is.
        """
        # Its own, for a thread can't be cancelled, and these may be closed meanwhile.
        fds = os.dup(server.fileno()), os.dup(self.fd)
        return await asyncio.to_thread(_collapse, self._base, *fds, min(limit, COLLAPSE_SECONDS))

    def close(self) -> None:
        """Safe to repeat."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _collapse(base: int, pidfd: int, fd: int, limit: float) -> int:
    """Closes both descriptors."""
    end, huge = time.monotonic() + limit, 0
    try:
        for offset in _well_filled(fd):
            part = _IoVec(base + offset, HUGE_PAGE)
            # One at a time: the server's own page faults wait for it.
            done = _libc.syscall(_SYS_PROCESS_MADVISE, pidfd, ctypes.byref(part), 1, _MADV_COLLAPSE, 0)
            huge += done == HUGE_PAGE
            if time.monotonic() > end:
                break
    finally:
        os.close(pidfd)
        os.close(fd)
    return huge


def _well_filled(fd: int) -> Iterator[int]:
    """Offsets of the huge pages of which at least half is there: the rest of each will be taken from the machine."""
    at, huge_page, filled = 0, -1, 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data beyond (lseek(2))
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        while start < at:
            offset = start - start % HUGE_PAGE
            upto = min(at, offset + HUGE_PAGE)
            before = filled if offset == huge_page else 0
            huge_page, filled = offset, before + upto - start
            if before < HUGE_PAGE // 2 <= filled:
                yield offset
            start = upto
