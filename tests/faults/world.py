"""A whole system to be broken: NATS, coordinator and agents as processes that are started again when they end, and
berths as containers. All of it is on a network of its own, and gone when the world is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import quicferry
from quicferry import faults
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from quicferry.cli.session import heralds
from quicferry.host import berths as host_berths
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import (
    CancelReply,
    CancelRequest,
    MigrateReply,
    MigrateRequest,
    Options,
    Placement,
    ServicesReply,
    ServicesRequest,
)
from quicferry.protocol.errors import FerryError
from tests.conftest import NatsServer
from tests.e2e.berths import IMAGE, LABEL, PORT, PROJECT, Harbour, podman
from tests.e2e.moving import Pinger
from tests.faults.parts import LOOK, PATIENCE, Berth, Program

SERVICES: Final = ("coordinator", "checkpoint_agent", "restore_agent")
NATS_PORT: Final = 4222
FIRST_IP: Final = 11
"""Of the berths; the last byte."""
SERVES_SECONDS: Final = 30.0
OPTIONS: Final = Options(ack_timeout_ms=300, quiesce_timeout_ms=300, phase_timeout_ms=1_500, settle_timeout_ms=1_000)
IMAGES_MIB: Final = 64
IN_BERTH: Final = "/run/faults"


class World:
    """Made by :func:`world`."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex[:8]
        self.folder = folder
        self.planted = folder / "faults"
        self.harbour = Harbour(folder)
        self.tls = folder / "tls"
        self.images = folder / "images"
        self.berths: dict[str, Berth] = {}
        self.programs: dict[str, Program] = {}
        self.interface = ""
        """The bridge that every datagram between clients and berths passes."""
        self._gateway = ""
        self.nats: NatsServer
        self.bus: Bus
        self.log: EventLog
        self.registry: Registry

    async def open(self, stack: contextlib.AsyncExitStack, services: Sequence[str], berths: int) -> None:
        """Start everything: of each service ``berths`` berths, with a server in the first."""
        self.planted.mkdir()
        self.tls.mkdir()
        stack.enter_context(tmpfs(self.images))
        stack.push_async_callback(self.harbour.close)
        await self.harbour.open()
        self.interface = podman("network", "inspect", "-f", "{{.NetworkInterface}}", self.harbour.network)
        self._gateway = podman("network", "inspect", "-f", "{{(index .Subnets 0).Gateway}}", self.harbour.network)
        stack.push_async_callback(self._close_programs)
        for service in services:
            for index in range(berths):
                await self.add_berth(service, with_server=index == 0)
        folder = self.folder / "nats"
        folder.mkdir()
        self.nats = NatsServer(folder, host=self._gateway, port=NATS_PORT)
        stack.callback(self.nats.stop)
        await self.nats.start()
        settings = NatsSettings.load(self.nats.url)
        self.bus = await stack.enter_async_context(Bus.connect("faults", settings, wait=True))
        self.log, self.registry = await EventLog.open(self.bus), await Registry.open(self.bus)
        for name in SERVICES:
            self.add_program(name).start()
        for program in self.programs.values():
            await program.ready(1)

    def add_program(self, name: str, called: str = "") -> Program:
        """Another process of a service of ours, not yet started; ``called`` tells two of one service apart."""
        called = called or name
        program = self.programs[called] = Program(name, self.folder / f"{called}.log", self._environment())
        program.log.touch()
        return program

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": f"{PROJECT}:{PROJECT}/shared",
            "NATS_URL": self.nats.url,
            "CONTAINER_HOST": self.harbour.url,
            "QUICFERRY_IMAGES": str(self.images),
            "QUICFERRY_STACK": self.mark,
            faults.VARIABLE: str(self.planted),
        }

    async def _close_programs(self) -> None:
        await asyncio.gather(*(program.close() for program in self.programs.values()))

    # Berths.

    async def add_berth(self, service: str, *, with_server: bool) -> None:
        """Start one more berth of a service."""
        name = f"{service}-{'abcdefgh'[len(self.of(service))]}"
        ip = f"{self._gateway.rpartition('.')[0]}.{FIRST_IP + len(self.berths)}"
        self.berths[name] = Berth(name=name, service=service, ip=ip)
        await self.start_berth(name, with_server=with_server)
        if len(self.berths) == 1:
            self._keep_address()

    def _keep_address(self) -> None:
        """A bridge takes the lowest address of its ports, so that each new berth may change it; and who has asked for
        the old one a moment ago goes on sending there for half a minute, into nothing. One that was set stays."""
        address = Path(f"/sys/class/net/{self.interface}/address").read_text(encoding="ascii").strip()
        subprocess.run(["ip", "link", "set", "dev", self.interface, "address", address], check=True)

    async def start_berth(self, name: str, *, with_server: bool) -> None:
        """Start a berth, in place of the container it was in, if any."""
        berth = self.berths[name]
        container = f"{name}-{self.mark}"
        labels = {
            LABEL: self.harbour.mark,
            host_berths.LABEL_STACK: self.mark,
            host_berths.LABEL_BERTH: name,
            host_berths.LABEL_SERVICE: berth.service,
            host_berths.LABEL_PORT: str(PORT),
            host_berths.LABEL_ADDRESS: f"{berth.ip}:{PORT}",
        }
        variables = {
            "NATS_URL": f"nats://{self._gateway}:{NATS_PORT}",
            "QUICFERRY_SERVICE": berth.service,
            "QUICFERRY_CERT": "/tls/cert.pem",
            "QUICFERRY_KEY": "/tls/key.pem",
            faults.VARIABLE: IN_BERTH,
        }
        await asyncio.to_thread(podman, "rm", "-f", "-t", "0", "--ignore", container)
        await asyncio.to_thread(
            podman,
            *("run", "-d", "--name", container, "--network", self.harbour.network, "--ip", berth.ip),
            *("--tmpfs", "/run", "--cap-add", "CHECKPOINT_RESTORE", "-v", f"{self.tls}:/tls"),
            *(part for key, value in labels.items() for part in ("--label", f"{key}={value}")),
            *(part for key, value in variables.items() for part in ("-e", f"{key}={value}")),
            *("--entrypoint", '["berth-init", "--"]', IMAGE),
            *(("python", "-m", "services.echo_server") if with_server else ()),
        )
        berth.init_pid = int(await asyncio.to_thread(podman, "inspect", "-f", "{{.State.Pid}}", container))
        self.faults_in(berth).mkdir(exist_ok=True)
        berth.remember()

    async def remove_berth(self, name: str) -> None:
        await asyncio.to_thread(podman, "rm", "-f", "-t", "0", "--ignore", f"{name}-{self.mark}")

    def lives(self, berth: Berth) -> bool:
        return os.path.exists(f"/proc/{berth.init_pid}/ns/pid")

    def of(self, service: str) -> list[Berth]:
        return [berth for berth in self.berths.values() if berth.service == service]

    def faults_in(self, berth: Berth) -> Path:
        """Where a server in this berth looks for its faults."""
        return Path(f"/proc/{berth.init_pid}/root{IN_BERTH}")

    async def see_to_berths(self, service: str) -> bool:
        """What compose's restart policy and an operator do: berths that are gone come back, and if no server is
        left there is a new one. Returns whether there had to be."""
        berths = self.of(service)
        for berth in berths:
            if not self.lives(berth):
                await self.start_berth(berth.name, with_server=False)
        if any(berth.server_pid for berth in berths):
            return False
        await self.start_berth(berths[0].name, with_server=True)
        return True

    # What a client of the API does.

    async def ask(self, request: MigrateRequest, patience: float = 20.0) -> MigrateReply:
        """Ask for a migration as the command does: again and again with the same id, until a coordinator answers."""
        end = asyncio.get_running_loop().time() + patience
        while True:
            try:
                return await self.bus.request(subjects.MIGRATE, request, MigrateReply, timeout=2.5)
            except FerryError as error:
                if asyncio.get_running_loop().time() > end:
                    raise
                if error.code not in ("no_answer", "not_leading", "nats_unreachable", "internal"):
                    raise
            await asyncio.sleep(0.1)  # as the command does: nothing tells when one leads

    async def cancel(self, migration: str) -> None:
        with contextlib.suppress(FerryError):  # too late, or nobody there: the fault is what is tested
            await self.bus.request(subjects.CANCEL, CancelRequest(id=migration), CancelReply, timeout=2)

    async def serves(self, service: str) -> Placement:
        """Where the service is, once its server is reported and answers."""
        async with asyncio.timeout(SERVES_SECONDS):
            while True:
                with contextlib.suppress(FerryError):
                    reply = await self.bus.request(subjects.SERVICES, ServicesRequest(), ServicesReply, timeout=2)
                    known = [placement for placement in reply.services if placement.service == service]
                    # A berth that was just replaced is reported a moment later.
                    true = known and self._true(reply, service) and known[0].place.berth == self.home(service)
                    if true and await heralds(self.bus, service):
                        return known[0]
                await asyncio.sleep(LOOK)

    def _true(self, reply: ServicesReply, service: str) -> bool:
        home = self.home(service)
        ours = [berth for berth in reply.berths if berth.service == service]
        return len(ours) == len(self.of(service)) and all(b.occupied == (b.berth == home) for b in ours)

    def home(self, service: str) -> str:
        """The berth that a server is in, whatever anybody says."""
        there = [berth.name for berth in self.of(service) if berth.server_pid]
        return there[0] if len(there) == 1 else ""

    async def events(self, migration: str) -> list[ev.AnyEvent]:
        return [entry.event for entry in await self.log.read(migration)]

    async def seen(self, migration: str, kind: type[ev.Event]) -> None:
        """Until the migration's log has an event of the kind."""
        async with asyncio.timeout(PATIENCE):
            while not any(isinstance(event, kind) for event in await self.events(migration)):
                await asyncio.sleep(LOOK)

    @contextlib.asynccontextmanager
    async def client(self, service: str = "echo", name: str = "client") -> AsyncIterator[Pinger]:
        """A client's session, pinging while the block runs."""
        address = (await self.serves(service)).place.address
        cafile = str(self.tls / "cert.pem")
        dial = quicferry.connect(address.host, address.port, cafile=cafile, server_name="localhost", name=name)
        async with dial as connection:
            pinger = Pinger(connection, 0.01)
            async with pinger.going():
                yield pinger

    async def ended(self, migration: str, patience: float = 120.0) -> list[ev.AnyEvent]:
        """The migration's events up to its outcome. Raises TimeoutError."""
        async with asyncio.timeout(patience):
            while True:
                with contextlib.suppress(FerryError):
                    seen = await self.events(migration)
                    if any(isinstance(event, ev.Completed | ev.RolledBack | ev.Failed) for event in seen):
                        return seen
                await asyncio.sleep(5 * LOOK)  # the log is asked, and not followed: NATS may be away


@contextlib.asynccontextmanager
async def world(folder: Path, services: Sequence[str] = ("echo",), berths: int = 2) -> AsyncIterator[World]:
    """A world that runs; afterwards nothing of it is left."""
    made = World(folder)
    async with contextlib.AsyncExitStack() as stack:
        await made.open(stack, services, berths)
        yield made


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[None]:
    """A small file system of our own, so that filling it hurts nobody else."""
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={IMAGES_MIB}m,mode=0700", "quicferry", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)
