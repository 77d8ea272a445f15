"""Containers of the benchmark's own, in the running system's network: berths, and whatever else a variant needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from quicferry.host import berths, image, inventory, processes
from quicferry.host.command import run
from quicferry.host.compose import Stack
from quicferry.protocol.errors import FerryError

PODMAN_SECONDS: Final = 60.0
SERVER_SECONDS: Final = 15.0
SERVER: Final = ("python", "-m", "quicferry.bench.server")
MEMORY_FOLDER: Final = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder in it that is ours alone


class Box:
    """A running container."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        """The UDP port on the host's loopback."""
        self.init_pid = 0

    async def server(self) -> processes.Process:
        """The server in it, once it has its UDP socket; the caller closes it. Raises FerryError ``server_gone``."""
        end = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < end:
            if (found := processes.occupant(self.init_pid)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    if processes.udp_sockets(found.pid):
                        return found
                found.close()
            await asyncio.sleep(0.005)  # a process's socket announces itself to nobody
        raise FerryError("server_gone", f"No server listens in {self.name} after {SERVER_SECONDS:g} s.")


class Stand:
    """Starts and removes them. All carry the system's labels, so that ``quicferry down`` finds what a kill left."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._env = stack.environment
        self._boxes: list[str] = []
        self._network = ""

    @classmethod
    async def opened(cls, stack: Stack) -> Stand:
        """In the network of a running system. Raises FerryError ``setup_failed``."""
        stand = cls(stack)
        networks = await asyncio.to_thread(inventory.named, "network", stack.name, stand.env)
        if len(networks) != 1:
            raise FerryError("setup_failed", f"{stack.name} has {len(networks)} networks; one is due.")
        stand._network = networks[0]
        return stand

    @property
    def env(self) -> dict[str, str]:
        return self._env

    def box(self, name: str, port: int = 0) -> Box:
        """Not started yet; see :meth:`container`."""
        return Box(f"{self._stack.name}-bench-{name}", port)

    async def berth(
        self,
        name: str,
        command: Sequence[str] = (),
        *,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        service: str | None = None,
        start: bool = True,
    ) -> Box:
        """A berth as compose.yaml makes them; with ``service`` one the agents know and move things to.

        With a command that serves. Without ``start`` it is only created.
        """
        box = self.box(name, port or free_port())
        labels: dict[str, str] = {}
        # CRIU by hand knows nothing of the shared heap.
        heap = "private" if service is None else "shared"
        variables = {"QUICFERRY_CERT": "/tls/cert.pem", "QUICFERRY_KEY": "/tls/key.pem", "QUICFERRY_HEAP": heap}
        variables |= environment or {}
        if service is not None:
            labels = {
                berths.LABEL_STACK: self._stack.name,
                berths.LABEL_BERTH: f"bench-{name}",
                berths.LABEL_SERVICE: service,
                berths.LABEL_PORT: "4242",
                berths.LABEL_ADDRESS: f"127.0.0.1:{box.port}",
            }
            variables |= {"QUICFERRY_SERVICE": service, "NATS_URL": "nats://nats:4222"}
        await self.container(
            box,
            *("--network", self._network, "--publish", f"127.0.0.1:{box.port}:4242/udp"),
            *("--cap-add", "CHECKPOINT_RESTORE", "--tmpfs", "/run", "--volume", f"{self._stack.name}_tls:/tls"),
            *(option for key, value in labels.items() for option in ("--label", f"{key}={value}")),
            *(option for key, value in variables.items() for option in ("--env", f"{key}={value}")),
            *("--entrypoint", '["berth-init", "--"]', image.IMAGE, *command),
            start=start,
        )
        return box

    async def container(self, box: Box, *arguments: str, start: bool = True) -> None:
        """``podman run --detach`` or ``podman create`` with our labels, under the box's name."""
        self._boxes.append(box.name)
        verb = ["run", "--detach"] if start else ["create"]
        await self.podman(
            *(*verb, "--name", box.name, "--replace", "--label", f"{inventory.OURS}=1"),
            *("--label", f"{inventory.PROJECT_LABEL}={self._stack.name}", *arguments),
        )
        if start:
            await self.look(box)

    async def look(self, box: Box) -> None:
        """Learn the PID of a box that has just been started."""
        box.init_pid = int(await self.podman("inspect", "--format", "{{.State.Pid}}", box.name))

    async def podman(self, *arguments: str, timeout: float = PODMAN_SECONDS) -> str:
        """Its standard output. Raises FerryError ``setup_failed``."""
        doing = f"podman {arguments[0]}"
        said = await asyncio.to_thread(run, ["podman", *arguments], timeout=timeout, doing=doing, env=self._env)
        return said.strip()

    async def remove(self, *boxes: Box) -> None:
        """Safe to repeat."""
        names = [box.name for box in boxes if box.name in self._boxes]
        if names:
            await self.podman("rm", "--force", "--ignore", "--volumes", "--time", "0", *names)
            self._boxes = [name for name in self._boxes if name not in names]

    async def remove_all(self) -> None:
        await self.remove(*(Box(name, 0) for name in self._boxes))


def free_port() -> int:
    """A UDP port of the loopback that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def memory_folder() -> Iterator[int]:
    """A folder on tmpfs for root only, as a descriptor; gone at the end: images hold TLS keys."""
    folder = tempfile.mkdtemp(prefix="quicferry-bench-", dir=MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)
