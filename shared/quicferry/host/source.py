"""The checkpointing side of one migration: hold, dump, then kill or thaw the source. No NATS in here."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Final

import structlog

from quicferry import faults, quiet
from quicferry.host import criu_stats, processes
from quicferry.host.berths import BerthFacts
from quicferry.host.criu import CriuSession, outlive
from quicferry.host.heap import Heap
from quicferry.host.images import COMPLETE, DESCRIBED, Images, Manifest, boot_id
from quicferry.host.parking import Dock, bind_parked
from quicferry.host.podman import Podman
from quicferry.host.processes import Process
from quicferry.protocol import events, handover
from quicferry.protocol.agents import AgentRequest
from quicferry.protocol.errors import FerryError

log = structlog.get_logger(__name__)

HOLD_MARGIN: Final = 2.0
"""Seconds beyond the acks' and the quiesce limits until a server that does not park has refused."""
EXIT_TIMEOUT: Final = 2.0
ADOPT_TIMEOUT: Final = 5.0


class Source:
    """Owns everything one migration has open at its source. Steps are called one at a time, in order.

    :meth:`release` and :meth:`abort` also work on a fresh object, after the agent was restarted: CRIU died
    with the agent, so the source was thawed, and stands still without a socket.
    """

    def __init__(self, podman: Podman, images_root: Path, request: AgentRequest) -> None:
        self._podman = podman
        self._request = request
        self._images = Images(images_root, request.id, "source")
        self._berth: BerthFacts | None = None
        self._server: Process | None = None
        self._criu: CriuSession | None = None
        self._dock: Dock | None = None
        self._heap: Heap | None = None
        self._told = False
        """SIGTERM was sent."""
        self._dump: asyncio.Task[None] | None = None
        self._rounds = 0
        self._pipes: dict[str, str] = {}
        self._held_at = 0.0
        self._dumped_at = 0.0
        self._log = log.bind(id=request.id, berth=request.source.berth)

    async def prepare(self) -> events.SourceReady:
        """Find the server, start CRIU in its berth and wait for its socket. Nothing is touched yet.

        Raises FerryError ``berth_gone``, ``server_gone``, ``host_pid_namespace``, ``machine_unfit``,
        ``criu_missing``, ``port_taken``, ``podman_unreachable``.
        """
        berth, server = await self._find()
        if server is None:
            raise FerryError("server_gone", f"No server runs in berth {berth.name}.")
        self._server = server
        try:
            rss = processes.rss_bytes(server.pid)
        except ProcessLookupError:
            raise FerryError("server_gone", "The server has just exited.") from None
        self._heap = Heap.of(server.pid)
        shared = self._heap.size_bytes if self._heap is not None else 0
        huge = await self._heap.collapse(server, limit=self._phase / 4) if self._heap is not None else 0
        self._images.create(room_for_bytes=max(0, rss - shared))
        self._dock = Dock.open(berth.init_pid, berth.port)
        self._dock.expect(server.pid)
        external = [self._heap.key] if self._heap is not None else []
        self._criu = await CriuSession.start(berth.init_pid, self._images, external=external)
        self._log.info(
            "source_ready",
            pid=server.pid,
            rss_bytes=rss,
            shared_bytes=shared,
            huge_pages=huge,
            criu=".".join(map(str, self._criu.version)),
        )
        return events.SourceReady(
            id=self._request.id, at_ms=now_ms(), image=berth.image, rss_bytes=rss, shared_bytes=shared
        )

    async def pre_dump(self, number: int) -> events.PreDumped:
        """Pre-copy round ``number``, from 1, while the server serves.

        Raises FerryError ``dirty_tracking_missing``, ``criu_failed``, ``phase_timeout``.
        """
        criu, server, _ = self._ready()
        start = time.monotonic()
        (self._images.path / str(number)).mkdir(mode=0o700, exist_ok=True)
        await criu.pre_dump(server.berth_pid, number, timeout=self._phase)
        self._rounds = number
        took = time.monotonic() - start
        stats = criu_stats.read_dump(criu.work_fd)
        pages = stats.pages_written if stats else 0
        self._log.info("pre_dumped", round=number, pages=pages, took_ms=ms(took))
        return events.PreDumped(id=self._request.id, at_ms=now_ms(), round=number, pages=pages, took_ms=ms(took))

    async def hold(self) -> events.SourceHeld:
        """SIGTERM, then wait until the armed server has given up its socket and stands still.

        CRIU gets its request before, and waits at its ``pre-dump`` notification: so the freeze follows the
        hold at once. Raises FerryError ``hold_refused``, ``server_gone``, ``criu_failed``.
        """
        criu, server, dock = self._ready()
        await criu.begin_dump(server.berth_pid, rounds=self._rounds, timeout=self._phase)
        options = self._request.options
        limit = (options.ack_timeout_ms + options.quiesce_timeout_ms) / 1e3 + HOLD_MARGIN
        self._pipes = processes.outer_pipes(server.pid)
        heap = self._heap.key if self._heap is not None else ""
        manifest = Manifest(pipes=self._pipes, boot_id=boot_id(), heap=heap, nice=server.nice())
        self._images.write_manifest(manifest)
        self._images.tell(DESCRIBED)
        await faults.at("source.dump_asked")
        start = time.monotonic()
        self._told = True
        if not server.signal(signal.SIGTERM):
            raise FerryError("server_gone", "The server has exited.")
        await faults.at("source.told")
        parked = asyncio.create_task(dock.wait_parked())
        gone = asyncio.create_task(server.exited(limit))
        try:
            await asyncio.wait({parked, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if dock.parked and dock.parked_for in (None, self._request.id):
                # At once: the clients' pause has begun.
                self._held_at = time.monotonic()
                faults.strike("source.parked")
                self._dump = asyncio.create_task(self._dump_images(criu), name=f"dump {self._request.id}")
        finally:
            for task in (parked, gone):
                task.cancel()
            await asyncio.gather(parked, gone, return_exceptions=True)
        if self._dump is None:
            if not server.alive:
                raise FerryError(
                    "server_gone",
                    "The server exited on SIGTERM instead of holding: it was not armed.",
                    hint="An armed server is told its new address first, through NATS.",
                )
            if dock.parked:
                # It stood still in the middle of a move that was called off, and woke up only now.
                raise FerryError(
                    "hold_refused",
                    f"The server stands still for the migration {dock.parked_for!r}, which is over.",
                    hint="It gets its socket back; ask for the migration again.",
                )
            raise FerryError(
                "hold_refused",
                f"The server did not give up its socket within {limit:g} s.",
                hint="Its log says why; a blocked event loop can't answer SIGTERM.",
            )
        waited = self._held_at - start
        return events.SourceHeld(id=self._request.id, at_ms=now_ms(), waited_ms=ms(waited))

    async def dump_done(self, within: float) -> None:
        """Until the dump that :meth:`hold` began has ended, well or badly, but ``within`` seconds at most."""
        if self._dump is not None:
            await asyncio.wait({self._dump}, timeout=within)

    async def dump(self) -> events.Dumped:
        """See the dump through that :meth:`hold` began; the source stays frozen.

        Raises FerryError ``criu_failed``, ``phase_timeout``.
        """
        self._ready()
        if self._dump is None:
            raise FerryError("internal", "There is no dump without a hold.")
        await self._dump
        took = self._dumped_at - self._held_at
        dumped = events.Dumped(
            id=self._request.id,
            at_ms=now_ms(),
            pages=self._images.pages(),
            image_bytes=self._images.size_bytes(),
            took_ms=ms(took),
            pipes=self._pipes,
        )
        self._log.info("source_dumped", took_ms=ms(took), pages=dumped.pages, image_bytes=dumped.image_bytes)
        return dumped

    async def release(self) -> events.SourceGone:
        """After the commit: kill the frozen source. Safe to repeat.

        Raises FerryError ``criu_failed``, ``phase_timeout``, ``podman_unreachable``.
        """
        frozen_ms = None
        try:
            if self._criu is not None and self._server is not None:
                frozen_ms = await self._kill_through_criu(self._criu, self._server)
            else:
                await self._kill_held()
        finally:
            await self.close()
        self._images.remove_work()
        self._log.info("source_released", frozen_ms=frozen_ms)
        return events.SourceGone(id=self._request.id, at_ms=now_ms(), frozen_ms=frozen_ms)

    async def abort(self) -> events.SourceBack:
        """Before the commit: thaw the source and give it its socket back. Safe to repeat, at any stage.

        Raises FerryError ``hold_refused`` if a held server does not take its socket back.
        """
        try:
            await self._thaw()
            await faults.at("source.thawed")
            await self._give_back()
        finally:
            await self.close()
        self._images.remove()
        self._log.info("source_back")
        return events.SourceBack(id=self._request.id, at_ms=now_ms())

    async def shut_down(self) -> None:
        """The agent stops. Nothing can be committed before the dump is reported, so until then the source gets
        its socket back; afterwards only the log decides, and the source stays mute."""
        if self._told and not self._dumped_at:
            await self.abort()
        else:
            await self.close()

    async def close(self) -> None:
        """Let go of everything; a frozen source is thawed, but stays mute. Safe to repeat."""
        await self._end_dump()
        if self._criu is not None:
            await self._criu.close()
            self._criu = None
        if self._dock is not None:
            await self._dock.close()
            self._dock = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._heap is not None:
            self._heap.close()
            self._heap = None

    async def _end_dump(self) -> None:
        if self._dump is not None:
            self._dump.cancel()
            await asyncio.gather(self._dump, return_exceptions=True)
            self._dump = None

    async def _dump_images(self, criu: CriuSession) -> None:
        """Freeze and dump, and tell a target that waits for the images."""
        await criu.dump(timeout=self._phase)
        await faults.at("source.frozen")
        self._dumped_at = time.monotonic()
        self._images.tell(COMPLETE)
        await asyncio.sleep(quiet.DUMPED)

    @property
    def _phase(self) -> float:
        return self._request.options.phase_timeout_ms / 1e3

    def _ready(self) -> tuple[CriuSession, Process, Dock]:
        if self._criu is None or self._server is None or self._dock is None:
            raise FerryError(
                "internal",
                "This step came before prepare, or the agent was restarted since.",
                hint="The migration rolls back; ask for it again.",
            )
        return self._criu, self._server, self._dock

    async def _find(self) -> tuple[BerthFacts, Process | None]:
        berth = await self._podman.berth(self._request.source.berth)
        processes.check_init(berth.init_pid, berth.container)
        self._berth = berth
        return berth, processes.occupant(berth.init_pid)

    async def _find_left(self) -> tuple[BerthFacts, Process | None]:
        """The server as an agent that died has left it."""
        berth = await self._podman.berth(self._request.source.berth)
        await outlive(berth.init_pid)
        return await self._find()

    async def _kill_through_criu(self, criu: CriuSession, server: Process) -> float | None:
        """Kill the source; CRIU's frozen_time in milliseconds, if it dumped."""
        withheld = time.monotonic() - self._dumped_at
        if criu.withheld == "post-dump":
            await criu.finish(True, timeout=self._phase)
        if not await server.exited(EXIT_TIMEOUT):
            await _kill(server)
        stats = criu_stats.read_dump(criu.work_fd)
        # CRIU's clock ran on while its notification was withheld.
        return ms(stats.frozen - withheld) if stats is not None else None

    async def _kill_held(self) -> None:
        try:
            _, server = await self._find_left()
        except FerryError as error:
            if error.code != "berth_gone":
                raise
            return  # no berth, no source
        if server is not None:
            with server:
                # A server that serves is not this migration's source: that one can't send any more.
                if await processes.stands_still(server.pid):
                    await _kill(server)

    async def _thaw(self) -> None:
        await self._end_dump()
        if self._criu is not None:
            if self._criu.withheld:
                await self._criu.finish(False, timeout=self._phase)
            await self._criu.close()
            self._criu = None

    async def _give_back(self) -> None:
        if self._server is None:
            try:
                _, self._server = await self._find_left()
            except FerryError as error:
                if error.code != "berth_gone":
                    raise
        if self._server is None or self._berth is None:
            return
        udp, held_for = None, self._request.id
        if self._dock is not None:
            if self._told and not self._dock.parked:
                await self._dock.stop_parking()
            udp = self._dock.take()
            held_for = self._dock.parked_for or held_for  # it takes a socket of that migration only
            await self._dock.close()
            self._dock = None
        if udp is None:
            if not await processes.stands_still(self._server.pid):
                return
            # Its socket died with the agent that kept it: a new one on the same port does as well.
            udp = bind_parked(self._berth.init_pid, self._berth.port)
        self._dock = Dock.open(self._berth.init_pid, self._berth.port, udp=udp)
        self._dock.expect(self._server.pid)
        place = self._request.source
        self._dock.offer(
            handover.Adopted(
                id=held_for,
                outcome="rolled_back",
                node=place.node,
                berth=place.berth,
                address=place.address,
                epoch=max(0, self._request.epoch - 1),
            )
        )
        await faults.at("source.giving_back")
        self._server.signal(signal.SIGUSR2)
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT):
                await self._dock.wait_adopted()
        except TimeoutError:
            raise FerryError(
                "hold_refused", f"The thawed server did not take its socket back within {ADOPT_TIMEOUT:g} s."
            ) from None


async def _kill(server: Process) -> None:
    if not await server.kill():
        raise FerryError("phase_timeout", f"The source, PID {server.pid}, was sent SIGKILL and has not ended.")


def ms(seconds: float) -> float:
    """Milliseconds, to the microsecond."""
    return round(seconds * 1e3, 3)


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000
