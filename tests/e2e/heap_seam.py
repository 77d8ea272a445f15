"""Checks the shared heap from inside a process that has it; prints ``ok`` at the end. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
import threading

PAGE = mmap.PAGESIZE
RW = mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MREMAP_MAYMOVE, MADV_DONTNEED = 1, 4
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]


def heap() -> tuple[int, int]:
    with open("/proc/self/maps") as maps:
        found = [line.split()[0] for line in maps if "quicferry-heap (deleted)" in line]
    low, high = found[0].split("-")[0], found[-1].split("-")[1]
    return int(low, 16), int(high, 16)


def resident_kb() -> int:
    total, ours = 0, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if "-" in line.split()[0]:
                ours = "quicferry-heap" in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1])
    return total


def take(length: int, prot: int = RW, flags: int = PRIVATE) -> int:
    at = libc.mmap(None, length, prot, flags, -1, 0)
    assert at not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(at)


def seam() -> None:
    low, high = heap()
    size = 64 << 20
    before = resident_kb()
    at = take(size)
    assert low <= at < high, "a private anonymous mapping is cut out of the heap"
    ctypes.memset(at, 7, size)
    assert resident_kb() - before >= size // 1024
    assert libc.madvise(at, size // 2, MADV_DONTNEED) == 0
    assert ctypes.string_at(at, PAGE) == bytes(PAGE), "MADV_DONTNEED promises zeroes"
    assert ctypes.string_at(at + size // 2, PAGE) == b"\7" * PAGE
    wider = libc.mremap(at + size // 2, PAGE, 4 * PAGE, MREMAP_MAYMOVE)
    assert ctypes.string_at(wider, 2 * PAGE) == b"\7" * PAGE + bytes(PAGE), "it grew into fresh memory"
    assert libc.munmap(wider, 4 * PAGE) == 0
    assert libc.munmap(at, size) == libc.munmap(at, size) == 0, "twice is no error (munmap(2))"
    assert resident_kb() - before < size // 8192, "unmapping gives the memory back"
    again = take(size)
    assert again == at, "and the addresses"
    assert ctypes.string_at(again, size) == bytes(size), "fresh memory is zero"
    assert libc.munmap(again, size) == 0
    assert libc.munmap(low + 1, PAGE) == -1
    assert ctypes.get_errno() == errno.EINVAL
    none = take(PAGE, 0)  # PROT_NONE
    assert libc.munmap(none, PAGE) == 0
    ctypes.memset(take(PAGE), 1, PAGE)  # the same page: it can be written again
    for flags in (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, PRIVATE | 0x20000):  # MAP_STACK
        elsewhere = take(PAGE, flags=flags)
        assert not low <= elsewhere < high
    elsewhere = take(65 << 30, flags=PRIVATE | 0x4000)  # more than there is; MAP_NORESERVE
    assert not low <= elsewhere < high


def processes() -> None:
    try:
        os.fork()
        raise AssertionError("two processes have one heap")
    except OSError as error:
        refused = error.errno
    assert refused == errno.ENOSYS
    said = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
    assert said.stdout == "42\n", "a command started by vfork has a heap of its own"


def threads() -> None:
    wrong: list[int] = []

    def churn(seed: int) -> None:
        numbers = random.Random(seed)
        kept: list[bytearray] = []
        for _ in range(2_000):
            kept.append(bytearray([seed]) * numbers.choice((10, 1_000, 40_000, 2_000_000)))
            if len(kept) > 20:
                gone = kept.pop(numbers.randrange(20))
                if gone[0] != seed or gone[-1] != seed:
                    wrong.append(seed)

    running = [threading.Thread(target=churn, args=(seed,)) for seed in range(1, 5)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    assert not wrong, "threads got the same memory"


seam()
processes()
threads()
print("ok", flush=True)
