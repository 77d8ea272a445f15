"""Berths for tests: real containers, labelled so that a test removes all of its own even when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest

from quicferry.host import berths, machine
from quicferry.host.podman import Podman
from quicferry.host.processes import SERVER_PID
from quicferry.protocol.api import Address, Options, Place

PROJECT: Final = Path(__file__).resolve().parents[2]
LABEL: Final = "io.quicferry.test"
IMAGE: Final = os.environ.get("QUICFERRY_TEST_IMAGE", "localhost/quicferry:latest")
PORT: Final = 4242
BERTH_INIT: Final = ("python3", "-IS", "/test/berth_init.py", "--")
ECHO: Final = ("python3", "/test/udp_echo.py")
"""The UDP echo of udp_echo.py, as a berth's command."""
START_TIMEOUT: Final = 30.0


def environment() -> dict[str, str]:
    """The environment for podman on this machine."""
    return {**os.environ, **machine.environment(PROJECT)}


def podman(*arguments: str, check: bool = True, timeout: float = 60.0) -> str:
    """Run the podman command and return what it printed."""
    done = subprocess.run(
        ["podman", *arguments], env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"podman {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def require() -> None:
    """Skip the test, with the missing thing's name, where real berths can't be had."""
    if os.geteuid() != 0:
        pytest.skip("root is missing: berths need it")
    for program in ("podman", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing")
    if subprocess.run(["podman", "image", "exists", IMAGE], env=environment(), check=False).returncode:
        pytest.skip(f"image {IMAGE} is missing: make setup builds it (QUICFERRY_TEST_IMAGE names another)")


class TestBerth(msgspec.Struct, kw_only=True):
    """One berth, as a test sees it."""

    __test__ = False

    name: str
    container: str
    ip: str
    init_pid: int

    @property
    def place(self) -> Place:
        return Place(node="local", berth=self.name, address=Address(host=self.ip, port=PORT))

    def logs(self) -> list[str]:
        """What its servers have printed, as `podman logs` shows it."""
        return podman("logs", self.container).splitlines()


class Harbour:
    """Makes berths on a network of its own, with a podman service of its own for the agents' client."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex[:12]
        self.folder = folder
        self.images = Path("/dev/shm") / f"quicferry-test-{self.mark}"  # images belong on a tmpfs
        self.url = f"unix://{folder}/podman.sock"
        self.network = f"quicferry-test-{self.mark}"
        self._service: subprocess.Popen[bytes] | None = None

    async def open(self) -> None:
        podman("network", "create", "--label", f"{LABEL}={self.mark}", self.network)
        self._service = self._start_service()
        async with asyncio.timeout(START_TIMEOUT):
            while not (self.folder / "podman.sock").exists():
                assert self._service.poll() is None, (self.folder / "podman-service.log").read_text()
                await asyncio.sleep(0.02)  # nothing tells when the service has made its socket

    def _start_service(self) -> subprocess.Popen[bytes]:
        with (self.folder / "podman-service.log").open("wb") as log:
            return subprocess.Popen(
                ["podman", "system", "service", "--time=0", self.url], env=environment(), stdout=log, stderr=log
            )

    async def close(self) -> None:
        """Remove everything with this harbour's mark; every step is tried."""
        with contextlib.suppress(Exception):
            for container in podman("ps", "-aq", "--filter", f"label={LABEL}={self.mark}").split():
                podman("rm", "-f", "-t", "0", container, check=False)
            podman("network", "rm", "-f", self.network, check=False)
        if self._service is not None:
            self._service.terminate()
            try:
                self._service.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._service.kill()
                self._service.wait()
        shutil.rmtree(self.images, ignore_errors=True)

    async def berth(
        self,
        name: str,
        command: Sequence[str] = (),
        *,
        service: str = "echo",
        env: Mapping[str, str] | None = None,
        wait_for: str = "serving",
    ) -> TestBerth:
        """Start a berth; with ``command`` a server is in it, and has printed ``wait_for`` when this returns."""
        unique = f"{name}-{self.mark}"
        arguments = ["run", "-d", "--name", unique, "--network", self.network, "--tmpfs", "/run"]
        arguments += ["--cap-add", "CHECKPOINT_RESTORE", "--label", f"{LABEL}={self.mark}"]
        arguments += ["--label", f"{berths.LABEL_BERTH}={unique}", "--label", f"{berths.LABEL_SERVICE}={service}"]
        arguments += ["--label", f"{berths.LABEL_PORT}={PORT}"]
        arguments += ["--label", f"{berths.LABEL_ADDRESS}=127.0.0.1:{PORT}", "--entrypoint", ""]
        arguments += ["-v", f"{PROJECT}/shared/quicferry/host/berth_init.py:/test/berth_init.py:ro"]
        for script in ("udp_echo.py", "heap_server.py"):
            arguments += ["-v", f"{PROJECT}/tests/e2e/{script}:/test/{script}:ro"]
        for key, value in (env or {}).items():
            arguments += ["-e", f"{key}={value}"]
        container = podman(*arguments, IMAGE, *BERTH_INIT, *command)
        facts = podman(
            "inspect", "-f", "{{.State.Pid}} {{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container
        )
        pid, ip = facts.split()
        berth = TestBerth(name=unique, container=container, ip=ip, init_pid=int(pid))
        if command:
            await self.log_line(berth, wait_for)
        return berth

    async def log_line(self, berth: TestBerth, text: str) -> str:
        """Wait until ``text`` is in the berth's log; its line."""
        follower = await asyncio.create_subprocess_exec(
            "podman", "logs", "-f", berth.container, env=environment(), stdout=asyncio.subprocess.PIPE
        )
        assert follower.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT):
                async for raw in follower.stdout:
                    if text in (line := raw.decode()):
                        return line
            raise AssertionError(f"{text!r} is not in the log of {berth.name}: {berth.logs()}")
        finally:
            if follower.returncode is None:
                follower.kill()
            await follower.wait()


@contextlib.asynccontextmanager
async def harbour(folder: Path) -> AsyncIterator[Harbour]:
    """A harbour that is empty again afterwards. Skips where berths can't be had."""
    require()
    made = Harbour(folder)
    try:
        await made.open()
        yield made
    finally:
        await made.close()


class EchoClient:
    """A UDP client with one socket towards any berth."""

    def __init__(self) -> None:
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def __enter__(self) -> EchoClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.udp.close()

    def send(self, berth: TestBerth, text: str) -> None:
        self.udp.sendto(text.encode(), (berth.ip, PORT))

    async def line(self) -> str:
        """The next datagram's text."""
        async with asyncio.timeout(START_TIMEOUT):
            data, _ = await asyncio.get_running_loop().sock_recvfrom(self.udp, 2048)
        return data.decode()

    async def answer(self) -> tuple[int, int, str, str]:
        """The next answer: running number, PID in the berth, text, and the IP it came from."""
        async with asyncio.timeout(START_TIMEOUT):
            data, peer = await asyncio.get_running_loop().sock_recvfrom(self.udp, 2048)
        number, pid, text = data.decode().split(" ", 2)
        return int(number), int(pid), text, peer[0]

    async def ask(self, berth: TestBerth, text: str) -> int:
        """Send and check the answer; its running number."""
        self.send(berth, text)
        number, pid, echoed, ip = await self.answer()
        assert (pid, echoed, ip) == (SERVER_PID, text, berth.ip)
        return number


def sockets_of(pid: int) -> list[str]:
    """The inodes of all IP sockets that a process has open, with their protocol."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/{pid}/fd/{fd}")
            if link.startswith("socket:["):
                inodes.add(link[8:-1])
    found = []
    for protocol in ("udp", "udp6", "tcp", "tcp6", "raw", "raw6"):
        lines = Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]
        found += [f"{protocol}:{line.split()[9]}" for line in lines if line.split()[9] in inodes]
    return found


def quick_options() -> Options:
    """Limits that a test does not wait long for."""
    return Options(ack_timeout_ms=100, quiesce_timeout_ms=100, phase_timeout_ms=8_000)


def client_of(harbour: Harbour) -> Podman:
    return Podman(harbour.url)
