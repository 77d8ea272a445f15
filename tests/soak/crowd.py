"""The client processes, seen from the soak."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from quicferry.protocol.api import Address
from tests.e2e.berths import PROJECT
from tests.soak.words import (
    Account,
    Accounts,
    Connected,
    Ended,
    Gap,
    Go,
    Leave,
    NotConnected,
    Open,
    Order,
    Said,
    Still,
)

PATIENCE: Final = 90.0
"""For a client process to do what it is told; what it waits for itself takes 65 s at most."""
LINE: Final = 1 << 20


class ClientProcess:
    """One process of tests.soak.client."""

    def __init__(self, name: str, log: Path, say: Callable[[Said], None]) -> None:
        self.name = name
        self.kept = 0
        self._log = log
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._accounts: asyncio.Future[Accounts] | None = None

    @property
    def pid(self) -> int:
        """0 while it is not running."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self, cafile: Path, interval_ms: float) -> None:
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.soak.client"),
                *("--cafile", str(cafile), "--interval-ms", str(interval_ms)),
                cwd=PROJECT,
                env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT}/shared"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                limit=LINE,
            )
        self._reading = asyncio.create_task(self._read(self._process), name=self.name)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            said: Said = msgspec.json.decode(line, type=Said)
            if isinstance(said, Accounts):
                self.kept = said.kept
                if self._accounts is not None and not self._accounts.done():
                    self._accounts.set_result(said)
            else:
                self._say(said)

    def tell(self, order: Order) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")

    async def asked(self, order: Leave | Still) -> list[Account]:
        """The accounts that come back. Raises TimeoutError. One at a time."""
        self._accounts = asyncio.get_running_loop().create_future()
        self.tell(order)
        async with asyncio.timeout(PATIENCE):
            return (await self._accounts).sessions

    async def close(self) -> None:
        if self._process is None:
            return
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
                self._process.kill()
        await self._process.wait()
        if self._reading is not None:
            await self._reading


class Crowd:
    """All sessions; those of one service are spread over the processes."""

    def __init__(self, folder: Path, cafile: Path, interval_ms: float, *, processes: int) -> None:
        self.processes = [
            ClientProcess(f"clients {number}", folder / f"clients-{number}.log", self._hear)
            for number in range(1, processes + 1)
        ]
        self.opened = 0
        """Sessions that were ever connected."""
        self.on_gap: Callable[[Gap], None] = lambda gap: None
        self.on_ended: Callable[[Ended], None] = lambda ended: None
        self._cafile = cafile
        self._interval_ms = interval_ms
        self._dialled: dict[str, asyncio.Future[str]] = {}
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        for process in self.processes:
            await process.start(self._cafile, self._interval_ms)

    async def close(self) -> None:
        for process in self.processes:
            await process.close()

    def _hear(self, said: Said) -> None:
        match said:
            case Gap():
                self.on_gap(said)
            case Ended():
                self.on_ended(said)
            case Connected() | NotConnected():
                if (dialled := self._dialled.get(said.session)) is not None and not dialled.done():
                    dialled.set_result(said.why if isinstance(said, NotConnected) else "")
            case _:
                pass

    async def dial(self, service: str, address: Address, sessions: int) -> None:
        """Open so many sessions. Raises TimeoutError if they can't be."""
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(self._dial(service, address, number) for number in range(sessions)))

    async def _dial(self, service: str, address: Address, number: int) -> None:
        session = f"{service}-{self.opened}-{number}"
        self.opened += 1
        process = self.processes[number % len(self.processes)]
        while True:
            dialled = self._dialled[session] = asyncio.get_running_loop().create_future()
            process.tell(Open(session=session, service=service, host=address.host, port=address.port))
            if not await dialled:
                del self._dialled[session]
                return

    async def leave(self, service: str) -> list[Account]:
        """Close a service's sessions, and say what became of them. Raises TimeoutError."""
        return await self._all(Leave(service=service))

    async def still(self) -> list[Account]:
        """Let all fall silent until :meth:`go`, and hear what has come. Raises TimeoutError."""
        return await self._all(Still())

    def go(self) -> None:
        for process in self.processes:
            process.tell(Go())

    async def _all(self, order: Leave | Still) -> list[Account]:
        async with self._asking:
            accounts: Sequence[list[Account]] = await asyncio.gather(
                *(process.asked(order) for process in self.processes)
            )
        return [account for of_one in accounts for account in of_one]
