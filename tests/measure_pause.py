"""Where a pause goes, step by step, as the kernel's tracer sees it.

``python -m tests.measure_pause [--moves N]``, as root on x86-64, with a system up (``quicferry up``, NATS_URL)

Moves the service under the benchmark's client. Of each move it takes the system calls of both agents and of whatever
they start (raw_syscalls events in a tracefs instance of its own), finds the landmarks in them, and prints the median
time from one to the next. The steps add up to the gap, with the client's clock at either end. Tracing costs a little
of what it measures: these gaps are longer than the benchmark's.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

import structlog

from quicferry.bench.ferry import Ferry
from quicferry.bench.figures import Move
from quicferry.bus.connection import Bus
from quicferry.bus.settings import NatsSettings
from quicferry.cli.client import find_cafile
from quicferry.host import processes
from quicferry.host.command import run
from quicferry.host.compose import Stack

TRACEFS: Final = Path("/sys/kernel/tracing")
BUFFER_KB: Final = 16_384
"""For each CPU."""
READ, WRITE, SENDTO, RECVFROM, RECVMSG, PTRACE = 0, 1, 44, 45, 47, 101
"""x86-64's numbers (syscalls(2))."""
SEIZE, DETACH = 0x4206, 17
"""See ptrace(2)."""
PEEK: Final = 0x22
"""CRIU looks how long a message is (MSG_PEEK | MSG_TRUNC) before it takes it."""
POST_DUMP, POST_RESTORE, PRE_RESUME = 17, 23, 18
"""Bytes of CRIU's notifications (rpc.proto): 8 and the script's name, and 3 for a PID."""
LINE: Final = re.compile(
    r".*-(\d+)\s+\[\d+\]\s+\S+\s+([\d.]+): (sys_enter|sys_exit): NR (-?\d+) (?:\((.*)\)|= (-?\d+))"
)

STEPS: Final = (
    ("last echo", "to the client, until CRIU is let go: the client's interval, parking the socket"),
    ("let go", "CRIU looks at the processes before it freezes them"),
    ("frozen", "CRIU dumps"),
    ("dumped", "the agents pass the word, CRIU gets the inventory"),
    ("inventory", "CRIU restores"),
    ("restored", "the commit, and beside it CRIU's last stage"),
    ("acknowledged", "CRIU detaches"),
    ("running", "the server wakes up and fetches its socket"),
    ("socket", "it answers the first datagram"),
    ("answered", "the client's application has the echo"),
)
"""Where each begins, and what happens until the next."""


class Call(NamedTuple):
    """One system call; seconds of CLOCK_MONOTONIC."""

    pid: int
    number: int
    arguments: tuple[int, ...]
    start: float
    end: float
    result: int


class Tracer:
    """A tracefs instance of our own over ``pids`` and all that they fork."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = pids
        self._mounted = False
        self._folder = TRACEFS / "instances" / f"quicferry-{os.getpid()}"

    def __enter__(self) -> Self:
        if not (TRACEFS / "instances").is_dir():
            subprocess.run(["mount", "-t", "tracefs", "nodev", str(TRACEFS)], check=True)
            self._mounted = True
        self._folder.mkdir()
        numbers = (READ, WRITE, SENDTO, RECVFROM, RECVMSG, PTRACE)
        self._set("trace_clock", "mono")
        self._set("buffer_size_kb", str(BUFFER_KB))
        self._set("options/event-fork", "1")
        self._set("set_event_pid", " ".join(map(str, self._pids)))
        self._set("events/raw_syscalls/filter", "||".join(f"id=={number}" for number in numbers))
        self._set("events/raw_syscalls/enable", "1")
        return self

    def __exit__(self, *_: object) -> None:
        self._set("events/raw_syscalls/enable", "0")
        self._folder.rmdir()
        if self._mounted:
            subprocess.run(["umount", str(TRACEFS)], check=True)

    def clear(self) -> None:
        self._set("trace", "")

    def calls(self) -> list[Call]:
        """What was traced since :meth:`clear`, in the order of their ends."""
        return list(parse((self._folder / "trace").read_text(encoding="utf-8", errors="replace").splitlines()))

    def _set(self, name: str, value: str) -> None:
        (self._folder / name).write_text(value, encoding="ascii")


def parse(lines: Iterable[str]) -> Iterator[Call]:
    under_way: dict[int, tuple[int, tuple[int, ...], float]] = {}
    for line in lines:
        if (found := LINE.match(line)) is None:
            continue
        pid, at, kind, number, arguments, result = found.groups()
        if kind == "sys_enter":
            under_way[int(pid)] = (int(number), tuple(int(one, 16) for one in arguments.split(", ")), float(at))
        elif int(pid) in under_way:
            entered = under_way.pop(int(pid))
            yield Call(int(pid), entered[0], entered[1], entered[2], float(at), int(result))


def landmarks(calls: Sequence[Call], agents: frozenset[int]) -> dict[str, float]:
    """Seconds of CLOCK_MONOTONIC at which each step but the first began, and ``asked``, ``waiting``, ``last stage``.

    Raises StopIteration if one is missing.
    """

    def first(wanted: Callable[[Call], bool], after: float = 0.0) -> Call:
        return next(call for call in calls if call.start >= after and wanted(call))

    def last(wanted: Callable[[Call], bool], before: float) -> Call:
        return next(call for call in reversed(calls) if call.end <= before and wanted(call))

    def said(pid: int, size: int) -> Callable[[Call], bool]:
        return lambda call: (call.pid, call.number, call.result) == (pid, WRITE, size)

    def heard(pid: int) -> Callable[[Call], bool]:
        return lambda call: (call.pid, call.number) == (pid, RECVFROM) and call.arguments[3] == PEEK

    seized = first(lambda call: call.number == PTRACE and call.arguments[0] == SEIZE)
    dumped = first(said(seized.pid, POST_DUMP), seized.end)
    detached = last(lambda call: call.number == PTRACE and call.arguments[0] == DETACH, calls[-1].end)
    criu = detached.pid
    restored = first(said(criu, POST_RESTORE), dumped.end)
    inventory = max(
        (call for call in calls if (call.pid, call.number) == (criu, READ) and call.end < restored.start),
        key=lambda call: call.end - call.start,
    )
    last_stage = first(said(criu, PRE_RESUME), restored.end)
    socket = first(
        lambda call: call.number == RECVMSG and call.result > 0 and call.pid not in (*agents, criu, seized.pid),
        detached.end,
    )
    answer = first(
        lambda call: (call.pid, call.number) == (socket.pid, SENDTO) and call.arguments[4] != 0, socket.end
    )
    return {
        "asked": last(heard(criu), inventory.start).end,
        "waiting": inventory.start,
        "let go": last(heard(seized.pid), seized.start).end,
        "frozen": seized.start,
        "dumped": dumped.start,
        "inventory": inventory.end,
        "restored": restored.start,
        "last stage": last_stage.start,
        "acknowledged": first(heard(criu), last_stage.end).end,
        "running": detached.end,
        "socket": socket.end,
        "answered": answer.end,
    }


def tree(pid: int) -> Iterator[int]:
    """All threads of a process and of its descendants."""
    yield from map(int, os.listdir(f"/proc/{pid}/task"))
    for child in processes.children(pid):
        yield from tree(child)


def row(ms: Sequence[float], what: str) -> str:
    low, middle, high = statistics.quantiles(ms, n=4)
    return f"{middle:7.2f}  {low:6.2f} to {high:<6.2f}  {what}"


def tell(moves: Sequence[dict[str, float]], measured: Sequence[Move]) -> None:
    print(f"{'median':>7}  {'middle half':>16}  what")
    names = [name for name, _ in STEPS]
    for number, (name, what) in enumerate(STEPS):
        end = names[number + 1] if number + 1 < len(names) else "end"
        print(row([(move[end] - move[name]) * 1e3 for move in moves], f"{name}: {what}"))
    floors = [move.floor_ms or 0.0 for move in measured]
    print(row([move.gap_ms for move in measured], "the gap"))
    print(row(floors, "CRIU's frozen_time and restore_time"))
    print(row([move.gap_ms - floor for move, floor in zip(measured, floors, strict=True)], "the gap above them"))
    print(row([(move["last stage"] - move["restored"]) * 1e3 for move in moves], "CRIU's last stage by itself"))
    print(
        row([(move["waiting"] - move["asked"]) * 1e3 for move in moves], "before: a RESTORE request to the inventory")
    )


async def measure(count: int) -> None:
    stack = Stack(Path(__file__).parents[1])
    inspect = ["podman", "inspect", "--format", "{{.State.Pid}}"]
    containers = [item.id for item in stack.containers() if item.service.endswith("-agent")]
    if len(containers) != 2:
        sys.exit("No system is up here: quicferry up starts one.")
    said = run([*inspect, *containers], timeout=30, doing="looking for the agents", env=stack.environment)
    pids = [int(pid) for pid in said.split()]
    moves: list[dict[str, float]] = []
    measured: list[Move] = []
    async with Bus.connect("measure", NatsSettings.load(), wait=False) as bus:
        ferry = Ferry(bus, find_cafile(stack))
        traced = frozenset(one for pid in pids for one in tree(pid))
        with Tracer(traced) as tracer:
            for _ in range(count):
                tracer.clear()
                move, *_, gap = await ferry.move()
                assert gap is not None
                ahead = time.time() - time.monotonic()
                ends = {"last echo": gap.last_before - ahead, "end": gap.first_after - ahead}
                moves.append(landmarks(tracer.calls(), traced) | ends)
                measured.append(move)
    tell(moves, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moves", type=int, default=20)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    print(f"{arguments.moves} moves; load {os.getloadavg()[0]:.2f}")
    asyncio.run(measure(arguments.moves))


if __name__ == "__main__":
    main()
