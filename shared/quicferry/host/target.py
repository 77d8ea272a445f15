"""The restoring side of one migration: keep the port, restore, then let run or clear away. No NATS in here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

import structlog

from quicferry import faults
from quicferry.host import criu_stats, processes, thread_ids
from quicferry.host.berths import BerthFacts
from quicferry.host.criu import CriuSession, outlive
from quicferry.host.heap import Heap
from quicferry.host.images import COMPLETE, DESCRIBED, Images, Manifest, boot_id
from quicferry.host.parking import Dock, bind_parked, readable
from quicferry.host.podman import Podman
from quicferry.host.processes import Process
from quicferry.host.source import ADOPT_TIMEOUT, ms, now_ms
from quicferry.protocol import events, handover
from quicferry.protocol.agents import AgentRequest
from quicferry.protocol.errors import FerryError

log = structlog.get_logger(__name__)

OUTPUTS: Final = (1, 2)
"""The berth's own standard streams that a restored server's pipes are connected to."""
RESTORE_BEGUN: Final = "restore-begun"
WOKEN: Final = "woken"
"""From then on the copy may have written to a shared heap, which is then no longer that of its images."""
SOCKET_GIVEN: Final = "socket-given"
"""From then on the copy may have sent: its images must not be restored again, or packet numbers were used twice."""
REAP_SECONDS: Final = 1.0
"""For the berth's init to reap a server that has just died there."""
CLEAR_TIMEOUT: Final = 5.0
"""Seconds to clear a berth after an aborted restore."""


class Target:
    """Owns everything one migration has open at its target. Steps are called one at a time, in order.

    :meth:`resume` and :meth:`abort` also work on a fresh object, after the agent was restarted.
    """

    def __init__(self, podman: Podman, images_root: Path, request: AgentRequest) -> None:
        self._podman = podman
        self._request = request
        self._images = Images(images_root, request.id, "target")
        self._berth: BerthFacts | None = None
        self._server: Process | None = None
        self._criu: CriuSession | None = None
        self._dock: Dock | None = None
        self._source: Process | None = None
        """The server at the source, as far as this side has to know it."""
        self._heap: Heap | None = None
        self._manifest: Manifest | None = None
        """From when CRIU was asked for the restore on."""
        self._progress = -1
        self._heard = b""
        """What the source has said there."""
        self._log = log.bind(id=request.id, berth=request.target.berth)

    async def prepare(self) -> events.TargetReady:
        """Bind the parked socket in the empty berth and start CRIU there.

        Raises FerryError ``berth_gone``, ``berth_busy``, ``port_taken``, ``host_pid_namespace``,
        ``machine_unfit``, ``criu_missing``, ``podman_unreachable``.
        """
        berth, server = await self._find()
        if server is not None:
            server.close()
            raise FerryError("berth_busy", f"Berth {berth.name} holds a server.", hint="Choose an empty one.")
        if not await _pid_freed(berth):
            raise FerryError(
                "berth_busy",
                f"PID {processes.SERVER_PID} is taken inside berth {berth.name}.",
                hint="Nothing but a server may run there; restart the berth.",
            )
        self._images.create()
        if self._progress < 0:
            self._progress = self._images.listen()
        await self._dock_in(berth)
        await faults.at("target.bound")
        await self._find_source()
        taken = thread_ids.of(self._source.pid) if self._source is not None else []
        await thread_ids.continue_at(berth.init_pid, thread_ids.free_range(self._request.epoch, taken))
        outputs = _outputs(berth.init_pid)
        streams = [*outputs, self._heap.fd] if self._heap is not None else outputs
        try:
            self._criu = await CriuSession.start(
                berth.init_pid, self._images, cgroup_of=berth, streams=streams, restores=True
            )
            self._manifest = None
        finally:
            for fd in outputs:
                os.close(fd)
        self._log.info("target_ready", port=berth.port, criu=".".join(map(str, self._criu.version)))
        return events.TargetReady(id=self._request.id, at_ms=now_ms(), image=berth.image)

    async def images_complete(self) -> None:
        """Until the source's dump is done: asked for ahead, the restore begins without a word from anybody else.

        CRIU is asked for it as soon as the source has said what it is going to dump, and is ready by then.
        Raises FerryError ``phase_timeout``, and as :meth:`restore` does.
        """
        options = self._request.options
        limit = (options.ack_timeout_ms + options.quiesce_timeout_ms) / 1e3 + 2 * self._phase
        if self._progress < 0:
            return
        try:
            async with asyncio.timeout(limit):
                await self._hear(DESCRIBED)
                await self._begin()
                await self._hear(COMPLETE)
        except TimeoutError:
            raise FerryError("phase_timeout", f"No images came within {limit:g} s.") from None

    async def restore(self) -> events.Restored:
        """Rebuild the process; it does not run yet, and :meth:`stand_by` is still to come.

        Raises FerryError ``criu_failed``, ``phase_timeout``, ``heap_gone``.
        """
        start = time.monotonic()
        criu, dock, manifest = await self._begin()
        await faults.at("target.restoring")
        inventory = self._images.fill_view(same_boot=manifest.boot_id == boot_id())
        self._server = await criu.restore(inventory, timeout=self._phase)
        done = time.monotonic()
        await faults.at("target.restored")
        dock.expect(self._server.pid)
        return events.Restored(id=self._request.id, at_ms=now_ms(), took_ms=ms(done - start))

    async def _begin(self) -> tuple[CriuSession, Dock, Manifest]:
        """Ask CRIU for the restore, unless that is done."""
        if self._criu is None or self._dock is None:
            raise FerryError(
                "internal",
                "This step came before prepare, or the agent was restarted since.",
                hint="The migration rolls back; ask for it again.",
            )
        if self._manifest is not None:
            return self._criu, self._dock, self._manifest
        manifest = self._images.manifest()
        inherited = {
            link: self._criu.stream(OUTPUTS.index(int(number)))
            for number, link in manifest.pipes.items()
            if int(number) in OUTPUTS
        }
        if manifest.heap:
            if self._heap is None or self._heap.key != manifest.heap:
                raise FerryError(
                    "heap_gone",
                    f"The server's shared heap is not to be found: {self._what_is_at_source()}.",
                    hint="Start a new server in a berth of the service.",
                )
            inherited[manifest.heap] = self._criu.stream(len(OUTPUTS))
        self._images.mark(RESTORE_BEGUN)
        await self._criu.begin_restore(inherited)
        self._manifest = manifest
        return self._criu, self._dock, manifest

    def _what_is_at_source(self) -> str:
        berth = self._request.source.berth
        if self._source is None:
            return f"berth {berth} holds no server any more"
        has = "none" if self._heap is None else "another"
        return f"the server in berth {berth}, PID {self._source.pid}, has {has}"

    async def _hear(self, word: bytes) -> None:
        while word not in self._heard:
            await readable(self._progress)
            self._heard += os.read(self._progress, 16)

    async def stand_by(self) -> None:
        """See the restored process through CRIU's last stage, up to the point before it runs.

        This goes on while the commit is written; safe to repeat. If it fails, what was restored is killed, and
        :meth:`resume` restores again. Raises FerryError ``criu_failed``, ``phase_timeout``.
        """
        if self._criu is None or self._server is None or not self._criu.in_last_stage:
            return
        try:
            await self._last_stage(self._criu, self._server)
            await faults.at("target.standing_by")
        except FerryError:
            await self._criu.kill_restored()
            self._criu = None
            self._server.close()
            self._server = None
            raise

    async def _last_stage(self, criu: CriuSession, server: Process) -> None:
        # CRIU waits for ever for a task that was killed under its hands, so look at that too.
        stage = asyncio.create_task(criu.stand_by(timeout=self._phase))
        gone = asyncio.create_task(server.exited(self._phase))
        try:
            await asyncio.wait({stage, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not stage.done():
                raise FerryError("criu_failed", "The restored server died before it could run.")
            stage.result()
        finally:
            for task in (stage, gone):
                task.cancel()
            await asyncio.gather(stage, gone, return_exceptions=True)

    async def resume(self) -> events.Resumed:
        """After the commit: let it run and give it the parked socket. Safe to repeat.

        On a fresh object it does what is still missing, a restore from the kept images included.
        Raises FerryError ``criu_failed``, ``hold_refused`` if the target does not take the socket.
        """
        start = time.monotonic()
        await self._drop_the_dead()
        await self.stand_by()
        if self._server is None or self._dock is None:
            await self._catch_up()
        server, dock = self._server, self._dock
        if server is None or dock is None:  # it serves already, or has served
            return events.Resumed(id=self._request.id, at_ms=now_ms(), took_ms=0.0, queued=0)
        place = self._request.target
        dock.offer(
            handover.Adopted(
                id=self._request.id,
                outcome="moved",
                node=place.node,
                berth=place.berth,
                address=place.address,
                epoch=self._request.epoch,
            ),
            giving=lambda: self._note(SOCKET_GIVEN),
        )
        await faults.at("target.resuming")
        queued = dock.queued_bytes
        if not server.alive:  # it was not woken, and can be restored again
            raise FerryError("server_gone", "The restored server is gone.", hint="The berth's log says why.")
        server.set_nice(processes.RESUMED_NICE)
        self._note(WOKEN)
        # Before it runs: held, it blocks the signal and finds it waiting, a round trip to CRIU sooner.
        server.signal(signal.SIGUSR2)
        if self._criu is not None and self._criu.withheld == "pre-resume":
            await self._criu.finish(True, until="post-resume", timeout=self._phase)
        try:
            async with asyncio.timeout(ADOPT_TIMEOUT):
                await dock.wait_adopted()
        except TimeoutError:
            raise FerryError(
                "hold_refused", f"The restored server did not take its socket within {ADOPT_TIMEOUT:g} s."
            ) from None
        await faults.at("target.adopted")
        took = time.monotonic() - start
        stats = criu_stats.read_restore(self._criu.work_fd) if self._criu is not None else None
        return events.Resumed(
            id=self._request.id,
            at_ms=now_ms(),
            took_ms=ms(took),
            queued=queued,
            restore_ms=ms(stats.restore) if stats is not None else None,
        )

    async def leave(self) -> None:
        """The target serves: end CRIU, and the berth's init has the server for a child. Safe to repeat."""
        if self._server is not None:
            self._calm(self._server)
            self._log.info("target_serves", pid=self._server.pid)
        if self._criu is not None and self._criu.withheld:
            await self._criu.finish(True, timeout=self._phase)
        await self.close()

    def forget(self) -> None:
        """Delete the images; nothing needs them any more. Safe to repeat."""
        self._images.remove()
        self._log.info("target_left")

    async def abort(self) -> events.TargetCleared:
        """Before the commit: leave nothing of this migration in the berth. Safe to repeat, at any stage.

        Raises FerryError ``berth_busy`` if what was restored can't be killed.
        """
        begun = self._images.marked(RESTORE_BEGUN)
        if self._criu is not None:
            await self._criu.kill_restored()
            self._criu = None
        if begun:
            # Only then is what is found there ours: prepare saw the berth empty.
            await self._clear_berth()
        await self.close()
        self._images.remove()
        self._log.info("target_cleared")
        return events.TargetCleared(id=self._request.id, at_ms=now_ms())

    async def close(self) -> None:
        """Let go of everything. A restored server that has not run yet runs then, but mute. Safe to repeat."""
        if self._criu is not None:
            await self._criu.close()
            self._criu = None
        if self._dock is not None:
            await self._dock.close()
            self._dock = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._heap is not None:
            self._heap.close()
            self._heap = None
        if self._progress >= 0:
            os.close(self._progress)
            self._progress = -1

    @property
    def _phase(self) -> float:
        return self._request.options.phase_timeout_ms / 1e3

    async def _find(self) -> tuple[BerthFacts, Process | None]:
        berth = await self._podman.berth(self._request.target.berth)
        processes.check_init(berth.init_pid, berth.container)
        self._berth = berth
        return berth, processes.occupant(berth.init_pid)

    async def _find_source(self) -> None:
        """Get hold of the server at the source and of its shared heap; nothing changes once they have been found."""
        if self._heap is not None:
            return
        if self._source is not None:
            self._source.close()
            self._source = None
        try:
            berth = await self._podman.berth(self._request.source.berth)
            self._source = processes.occupant(berth.init_pid)
        except FerryError as error:
            if error.code != "berth_gone":  # no source: then it is the checkpoint agent who says so
                raise
        if self._source is not None:
            self._heap = Heap.of(self._source.pid)

    async def _dock_in(self, berth: BerthFacts) -> Dock:
        """The dock with the parked socket; another one if the berth is another one by now."""
        if self._dock is not None and self._dock.init_pid != berth.init_pid:
            await self._dock.close()
            self._dock = None
        if self._dock is None:
            udp = bind_parked(berth.init_pid, berth.port)
            try:
                self._dock = Dock.open(berth.init_pid, berth.port, udp=udp)
            except BaseException:
                udp.close()
                raise
        return self._dock

    async def _drop_the_dead(self) -> None:
        """A copy that died before it had its socket is to be restored once more; the socket waits, queue and all.

        So is one that a restore has not brought about: its CRIU must not be there when the next one is asked for.
        """
        if self._server is not None and self._server.alive:
            return
        if self._criu is not None:
            await self._criu.kill_restored()
            self._criu = None
        if self._server is not None:
            self._server.close()
            self._server = None

    def _note(self, mark: str) -> None:
        with contextlib.suppress(OSError):  # a full tmpfs: rather without the note than without a server
            self._images.mark(mark)

    def _calm(self, server: Process) -> None:
        """It serves, and has its own priority again."""
        with contextlib.suppress(FerryError):  # no images: then it serves for long
            server.set_nice(self._images.manifest().nice)

    async def _catch_up(self) -> None:
        """Bring a fresh object to where resume begins; without a server if the target serves, or has served."""
        berth = await self._podman.berth(self._request.target.berth)
        await outlive(berth.init_pid)
        berth, server = await self._find()
        if server is None and self._images.marked(SOCKET_GIVEN):
            self._log.warning("target_ended", reason="it had its socket, and its images are not restored again")
        elif server is None:
            if self._images.marked(WOKEN) and self._images.manifest().heap:
                raise FerryError(
                    "heap_gone",
                    "The restored server died between waking and serving, and may have changed its shared heap.",
                    hint="Start a new server in a berth of the service.",
                )
            await self.prepare()
            await self.restore()
            await self.stand_by()
        elif await processes.stands_still(server.pid):
            # CRIU let it go when the agent died; the socket and its queue died too, so a new one it is.
            self._server = server
            (await self._dock_in(berth)).expect(server.pid)
        else:
            with server:
                self._calm(server)

    async def _clear_berth(self) -> None:
        if self._berth is None:
            try:
                self._berth = await self._podman.berth(self._request.target.berth)
            except FerryError as error:
                if error.code == "berth_gone":
                    return
                raise
        await outlive(self._berth.init_pid)
        end = time.monotonic() + CLEAR_TIMEOUT
        while time.monotonic() < end:
            try:
                left = processes.occupant(self._berth.init_pid)
                if left is None and not processes.berth_pid_taken(self._berth.init_pid, processes.SERVER_PID):
                    return
            except FerryError:
                return  # the berth itself is gone
            if left is not None:
                with left:
                    await left.kill()
            else:
                await asyncio.sleep(0.002)  # a zombie has the PID until the berth's init has reaped it
        raise FerryError(
            "berth_busy",
            f"Berth {self._request.target.berth} still holds what was restored.",
            hint="Restart the berth.",
        )


def _outputs(init_pid: int) -> list[int]:
    """The berth's own OUTPUTS, opened."""
    found: list[int] = []
    try:
        found.extend(os.open(f"/proc/{init_pid}/fd/{number}", os.O_WRONLY | os.O_CLOEXEC) for number in OUTPUTS)
    except OSError as error:
        for fd in found:
            os.close(fd)
        raise FerryError("berth_gone", f"The berth's output can't be opened: {error}.") from None
    return found


async def _pid_freed(berth: BerthFacts) -> bool:
    """Whether the server's PID is free in the berth: a zombie has it until the berth's init has reaped it."""
    end = time.monotonic() + REAP_SECONDS
    while processes.berth_pid_taken(berth.init_pid, processes.SERVER_PID):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.002)  # nothing announces it
    return True
