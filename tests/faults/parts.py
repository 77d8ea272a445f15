"""What a world is made of: services as processes that are started again, and berths as /proc shows them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from quicferry.host import processes
from quicferry.protocol.errors import FerryError
from tests.e2e.berths import PORT, PROJECT

READY: Final = {"coordinator": "ready", "checkpoint_agent": "agent_ready", "restore_agent": "agent_ready"}
PATIENCE: Final = 60.0
LOOK: Final = 0.02
"""Seconds between two looks at what nothing announces: a process's state, a file, the registry."""


class Program:
    """A service of ours as a process, which a supervisor starts again."""

    def __init__(self, name: str, log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log = log
        self.starts = 0
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._begins = 0
        """Where in the log the present life begins."""
        self._wanted = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """0 while it is not running."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    def start(self) -> None:
        self._wanted = True
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    async def _supervise(self) -> None:
        while self._wanted:
            with self.log.open("ab") as output:
                self._begins = output.tell()
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", f"services.{self.name}"),
                    cwd=PROJECT,
                    env=self._environment,
                    stderr=output,
                )
            if not self._wanted:
                self._process.kill()
            self.starts += 1
            await self._process.wait()

    async def ready(self, starts: int) -> None:
        """Until the ``starts``-th start of it, or a later one, answers."""
        async with asyncio.timeout(PATIENCE):
            while self.starts < starts or not self.pid or not self._said_ready():
                await asyncio.sleep(LOOK)

    def _said_ready(self) -> bool:
        with self.log.open("rb") as log:
            log.seek(self._begins)
            said = log.read().decode(errors="replace")
        return any(f" {word} " in said for word in (READY[self.name], "standing_by"))

    async def anew(self) -> None:
        """End it whatever it does, and wait for the next life."""
        starts = self.starts
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.ready(starts + 1)

    async def close(self, number: signal.Signals = signal.SIGKILL) -> None:
        self._wanted = False
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
        if self._task is not None:
            await self._task


class Berth(msgspec.Struct, kw_only=True):
    """A berth of this world; what is started again after a fault is the same berth in a new container."""

    name: str
    service: str
    ip: str
    init_pid: int = 0
    new: tuple[str, str] = ("", "")
    """Its mounts and packet filter rules as they were when it was new."""

    @property
    def server_pid(self) -> int:
        """The server in it, 0 if there is none or the berth is gone."""
        with contextlib.suppress(FerryError):
            if server := processes.occupant(self.init_pid):
                with server:
                    return server.pid
        return 0

    def commands(self) -> list[str]:
        """Of every process in it but its init and a server."""
        found = []
        for pid in inside(self.init_pid):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
                number = int(status.partition("NSpid:")[2].splitlines()[0].split()[-1])
                if number not in (1, processes.SERVER_PID):
                    found.append(Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip())
        return found

    def udp_ports(self) -> int:
        """How many sockets are bound to the service's port in it."""
        lines = Path(f"/proc/{self.init_pid}/net/udp").read_text(encoding="utf-8").splitlines()[1:]
        return sum(line.split()[1].endswith(f":{PORT:04X}") for line in lines)

    def listeners(self) -> int:
        """Unix sockets of ours in its network namespace."""
        return Path(f"/proc/{self.init_pid}/net/unix").read_text(encoding="utf-8").count("@quicferry")

    def remember(self) -> None:
        """It is new."""
        self.new = self._mounts_and_rules()

    def changed(self) -> list[str]:
        """Which of its mounts and packet filter rules are not what they were."""
        now = self._mounts_and_rules()
        return [what for what, one, other in zip(("mounts", "rules"), self.new, now, strict=True) if one != other]

    def _mounts_and_rules(self) -> tuple[str, str]:
        mounts = Path(f"/proc/{self.init_pid}/mounts").read_text(encoding="utf-8")
        command = ["nsenter", "--target", str(self.init_pid), "--net", "iptables-save"]
        rules = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE).stdout
        return mounts, "\n".join(line for line in rules.splitlines() if line[:1] != "#")  # comments have the time


def inside(init_pid: int) -> list[int]:
    """The processes in the PID namespace of ``init_pid``."""
    namespace = os.readlink(f"/proc/{init_pid}/ns/pid")
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                    found.append(int(entry))
    return found


def state_of(pid: int) -> str:
    """``T`` is stopped (proc_pid_stat(5)); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][:1]
    except OSError:
        return ""
