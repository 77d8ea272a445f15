"""What it costs that NATS has an entry of the log on the disk before it acknowledges it.

``python -m tests.measure_sync [--moves N] [--folder DIR] [--strace]``

Two real nats-servers, alike but for ``sync_interval``, have their stores on the same disk and take turns: one move's
entries each, one after the other, through the EventLog that everybody uses. Times are the writer's, from the call to
the acknowledgement. ``--strace`` counts the servers' calls of fsync instead; it slows them down too much for times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import structlog

from quicferry.bench.figures import summary
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import events as ev
from quicferry.protocol.api import Address, Place
from tests.conftest import NatsServer

LAZY, ALWAYS = "120s", "always"
"""NATS's own default, and what compose.yaml sets."""
IN_THE_PAUSE: Final = ("checkpoint.dumped", "restore.restored", "decision.committed")
"""From the freeze to the resume a move waits for these; each for the one before it, at worst."""
WARM_UP: Final = 3
"""Moves that are not counted."""


def entries(migration: str) -> Iterator[ev.AnyEvent]:
    """What a move with one client writes, in the order in which it does."""
    place = {name: Place(node="local", berth=name, address=Address(host="127.0.0.1", port=14242)) for name in "ab"}
    image, pipes = f"sha256:{'7' * 64}", {"1": "pipe:[123456]", "2": "pipe:[123457]"}
    base = {"id": migration, "at_ms": time.time_ns() // 1_000_000}
    yield ev.Requested(**base, service="echo", source=place["a"], target=place["b"], epoch=1)
    yield ev.SourceReady(**base, image=image, rss_bytes=21_000_000, shared_bytes=18_000_000)
    yield ev.TargetReady(**base, image=image)
    yield ev.Prepared(**base)
    yield ev.Armed(**base, clients=1)
    yield ev.MigrateSent(**base, clients=1)
    yield ev.AckSeen(**base, client="car-1", after_ms=1.234)
    yield ev.Quiesced(**base, acks=1, clients=1, ready=0, closed=0)
    yield ev.SourceHeld(**base, waited_ms=12.345)
    yield ev.Dumped(**base, pages=512, image_bytes=2_400_000, took_ms=12.345, pipes=pipes)
    yield ev.Restored(**base, took_ms=8.345)
    yield ev.Committed(**base)
    yield ev.Resumed(**base, took_ms=1.234, queued=4096, restore_ms=8.345)
    yield ev.Adopted(**base, outcome="moved", still_ms=31.234)
    yield ev.ClientArrived(**base, client="car-1", source="wrapper", interruption_ms=33.4)
    yield ev.SourceGone(**base, frozen_ms=13.7)
    yield ev.Completed(**base, arrived=1)


async def move(event_log: EventLog, migration: str) -> dict[str, float]:
    """Write one move's entries; milliseconds of each, by its kind."""
    took, last = {}, 0
    for event in entries(migration):
        start = time.perf_counter()
        if isinstance(event, ev.Decision):
            last = await event_log.decide(event, after=last)
        else:
            await event_log.append(event)
        took[ev.kind(event)] = (time.perf_counter() - start) * 1e3
    return took


async def take_turns(logs: dict[str, EventLog], moves: int) -> dict[str, list[dict[str, float]]]:
    """The order changes from turn to turn, so that neither always comes after the other."""
    took: dict[str, list[dict[str, float]]] = {name: [] for name in logs}
    for number in range(WARM_UP + moves):
        for name in list(logs)[:: 1 if number % 2 else -1]:
            one = await move(logs[name], f"m{number}")
            if number >= WARM_UP:
                took[name].append(one)
    return took


@contextlib.asynccontextmanager
async def serving(folder: Path, sync: str) -> AsyncIterator[EventLog]:
    server = NatsServer(folder, f'jetstream {{ sync_interval: "{sync}" }}')
    await server.start()
    try:
        async with Bus.connect("measure", NatsSettings.load(server.url), wait=False) as bus:
            yield await EventLog.open(bus)
    finally:
        server.stop()


def plain_fsync(folder: Path) -> list[float]:
    """The disk by itself: milliseconds of 300 bytes appended to a file and fsync(2)."""
    took = []
    with (folder / "plain").open("ab", buffering=0) as file:
        for _ in range(100):
            start = time.perf_counter()
            file.write(b"x" * 300)
            os.fsync(file.fileno())
            took.append((time.perf_counter() - start) * 1e3)
    return took


class Strace:
    """Counts the calls of fsync(2) and fdatasync(2) of the server that has ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._report = folder / "strace"
        (ports,) = folder.glob("*.ports")  # nats-server_PID.ports
        pid = ports.stem.rpartition("_")[2]
        command = ["strace", "-f", "-c", "-e", "trace=fsync,fdatasync", "-o", str(self._report), "-p", pid]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        assert "attached" in self._process.stderr.readline()

    def count(self) -> int:
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=10)
        lines = re.findall(r"^.*\s(\d+)\s+(?:\d+\s+)?f(?:data)?sync$", self._report.read_text(), re.MULTILINE)
        return sum(map(int, lines))


def line(what: str, unit: str, values: list[float]) -> str:
    found = summary(values)
    assert found is not None
    low, _, high = statistics.quantiles(values, n=4)
    return f"{what:34} {found.median:8.2f} {low:8.2f} to {high:.2f} {found.p90:8.2f} {found.max:8.2f}  {unit}"


def tell(took: dict[str, list[dict[str, float]]], disk: list[float]) -> None:
    print(f"{'':34} {'median':>8} {'middle half':>16} {'p90':>8} {'worst':>8}")
    print(line("write 300 bytes and fsync", "ms", disk))
    for name, moves in took.items():
        print(line(f"{name}: one entry", "ms", [ms for one in moves for ms in one.values()]))
    for name, moves in took.items():
        print(line(f"{name}: a move's {len(moves[0])}", "ms", [sum(one.values()) for one in moves]))
    for name, moves in took.items():
        print(line(f"{name}: the {len(IN_THE_PAUSE)} in the pause", "ms", [_in_the_pause(one) for one in moves]))
    pairs = list(zip(took[LAZY], took[ALWAYS], strict=True))
    print(line("the same, always less 120s", "ms", [_in_the_pause(b) - _in_the_pause(a) for a, b in pairs]))
    print(line("a move, always ÷ 120s", "", [sum(b.values()) / sum(a.values()) for a, b in pairs]))


def _in_the_pause(one: dict[str, float]) -> float:
    return sum(one[kind] for kind in IN_THE_PAUSE)


async def measure(folder: Path, moves: int, *, strace: bool) -> None:
    stores = {name: folder / name for name in (LAZY, ALWAYS)}
    for store in stores.values():
        os.mkdir(store)
    async with serving(stores[LAZY], LAZY) as lazy, serving(stores[ALWAYS], ALWAYS) as always:
        logs = {LAZY: lazy, ALWAYS: always}
        if not strace:
            tell(await take_turns(logs, moves), plain_fsync(folder))
            return
        counting = {name: Strace(store) for name, store in stores.items()}
        took = await take_turns(logs, moves)
        for name, calls in counting.items():
            print(f"{name}: {calls.count()} calls of fsync for {(WARM_UP + moves) * len(took[name][0])} entries")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moves", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk in question; default: here")
    parser.add_argument("--strace", action="store_true", help="count calls of fsync; needs strace, and root")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory(prefix=".measure-sync-", dir=arguments.folder) as folder:
        command = ["df", "--output=source,fstype", folder]
        disk = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
        print(f"{arguments.moves} moves each, in turn; {' '.join(disk)}; load {os.getloadavg()[0]:.2f}")
        asyncio.run(measure(Path(folder), arguments.moves, strace=arguments.strace))


if __name__ == "__main__":
    main()
