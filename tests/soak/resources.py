"""What the processes of a soak take: descriptors, threads, memory, children. Read from /proc (proc(5))."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

from quicferry.host import processes
from quicferry.host.heap import Heap
from tests.faults.world import World
from tests.soak.crowd import Crowd
from tests.soak.leaks import Reading
from tests.soak.moves import Service
from tests.soak.record import Life
from tests.soak.stage import Stage

WINDOW_BYTES: Final = 137
"""Of one change of a congestion window in a client's trace: a tuple, a float and an int of CPython. Measured."""
HEAP_SLACK: Final = 1 << 20
_NUMBER = re.compile(r"\d+")


class Gauges:
    """Reads them all, and keeps the readings of every life of every process."""

    def __init__(self, stage: Stage, services: Iterable[Service]) -> None:
        self._stage = stage
        self._services = list(services)
        self._lives: dict[tuple[str, int], Life] = {}

    def read(self, *, calm: bool) -> None:
        """Once all of them. What ends while it is looked at is left out."""
        world = self._stage.world
        for name, pid in _processes(world, self._stage.crowd):
            self._note(name, pid, pid, calm=calm)
        for service in self._services:
            home = world.home(service.name)
            if home and not service.dying:
                # Every copy of one server is the same server.
                self._note(f"server of {service.name}", world.berths[home].server_pid, service.generation, calm=calm)
        result = self._stage.result
        result.lives = list(self._lives.values())
        inside = _count_inside(berth.init_pid for berth in world.berths.values())
        result.processes_max = max(result.processes_max, inside)
        if calm:
            result.processes_calm = inside

    def measure_images(self) -> None:
        """How much of their file system is taken."""
        result = self._stage.result
        result.images_max = max(result.images_max, _used(str(self._stage.world.images)))

    def left_heaps(self) -> list[str]:
        """In a calm a service's berths keep its server's heap and nothing else worth mentioning."""
        found = []
        for service in self._services:
            berths = self._stage.world.of(service.name)
            used = sum(_used(f"/proc/{berth.init_pid}/root/run") for berth in berths)
            heap = sum(_heap_bytes(berth.server_pid) for berth in berths if berth.server_pid)
            if used > heap + HEAP_SLACK:
                found.append(f"{service.name}: {used} bytes in /run of its berths, the heap has {heap}")
        return found

    def children(self) -> list[str]:
        """In a calm the coordinator and the agents have none."""
        found = []
        for name, program in self._stage.world.programs.items():
            for child in processes.children(program.pid) if program.pid else ():
                with contextlib.suppress(OSError), open(f"/proc/{child}/comm", encoding="utf-8") as file:
                    found.append(f"{name} has a child {file.read().strip()}")
        return found

    def _note(self, name: str, pid: int, number: int, *, calm: bool) -> None:
        try:
            reading, kinds = self._reading(name, pid), _kinds(pid)
        except (OSError, KeyError):  # it has ended; of a zombie some fields are missing
            return
        life = self._lives.setdefault((name, number), Life(process=name, number=number))
        most = life.most or reading
        life.most = Reading(
            at=reading.at,
            moves=reading.moves,
            fds=max(most.fds, reading.fds),
            threads=max(most.threads, reading.threads),
            memory=max(most.memory, reading.memory),
        )
        if calm:
            life.calm.append(reading)
            life.descriptors_first = life.descriptors_first or kinds
            life.descriptors_last = kinds

    def _reading(self, name: str, pid: int) -> Reading:
        status = _status(pid)
        if name.startswith("server of "):
            # A restored copy has few of its heap's pages in its page tables at first: VmRSS would say little.
            memory = status["RssAnon"] + _heap_bytes(pid)
        else:
            memory = status["VmRSS"] - self._kept_by_design(name)
        return Reading(
            at=self._stage.now(),
            moves=sum(bool(move.outcome) for move in self._stage.result.moves),
            fds=len(os.listdir(f"/proc/{pid}/fd")),
            threads=status["Threads"],
            memory=memory,
        )

    def _kept_by_design(self, name: str) -> int:
        return sum(WINDOW_BYTES * process.kept for process in self._stage.crowd.processes if process.name == name)


def _processes(world: World, crowd: Crowd) -> list[tuple[str, int]]:
    """Those that live long, but for the servers."""
    found = [(name, program.pid) for name, program in world.programs.items()]
    found += [("nats-server", world.nats.pid), *((process.name, process.pid) for process in crowd.processes)]
    return [(name, pid) for name, pid in found if pid]


def _count_inside(init_pids: Iterable[int]) -> int:
    """How many processes there are in the PID namespaces of these."""
    spaces = {space for pid in init_pids if (space := processes.pid_namespace(pid))}
    return sum(processes.pid_namespace(int(name)) in spaces for name in os.listdir("/proc") if name.isdecimal())


def _heap_bytes(pid: int) -> int:
    """Of a server's shared heap, wherever its file lies."""
    if (heap := Heap.of(pid)) is None:
        return 0
    try:
        return heap.size_bytes
    finally:
        heap.close()


def _used(folder: str) -> int:
    """Bytes taken in the file system that a folder is in."""
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def _status(pid: int) -> dict[str, int]:
    """Figures of /proc/PID/status; sizes in bytes."""
    found: dict[str, int] = {}
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            words = value.split()
            if key in ("VmRSS", "RssAnon", "Threads"):
                found[key] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return found


def _kinds(pid: int) -> dict[str, int]:
    """What its descriptors are, without their numbers."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            kinds[_NUMBER.sub("N", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
    return dict(kinds)
