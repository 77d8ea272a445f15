"""A client of ``criu swrk``: one CRIU, started ahead inside a berth, asked for one dump or one restore.

``criu swrk FD`` reads protobuf requests from a SOCK_SEQPACKET socket (criu/cr-service.c). With
``notify_scripts`` it announces its stages and waits for an acknowledgement at each, which is how the two sides
of a move are interlocked: a withheld ``post-dump`` keeps the source frozen, a withheld ``pre-resume`` keeps
the target from running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from quicferry.host import cgroups, criu_errors
from quicferry.host import criu_rpc_pb2 as rpc
from quicferry.host.berths import BerthFacts
from quicferry.host.images import Images
from quicferry.host.processes import Process, children, guests
from quicferry.protocol.errors import FerryError

log = structlog.get_logger(__name__)

LEAST_VERSION: Final = (4, 2)
MAX_PACKET: Final = 64 * 1024
START_TIMEOUT: Final = 5.0
EXIT_TIMEOUT: Final = 5.0
LOG_LEVEL_VARIABLE: Final = "QUICFERRY_CRIU_LOG_LEVEL"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CriuSession:
    """One CRIU process in a berth's namespaces. Start it with :meth:`start`; always :meth:`close` it.

    Every method bounds its waits by its ``timeout`` in seconds and raises FerryError ``criu_failed`` with
    the end of CRIU's log, or ``phase_timeout``. After an error only :meth:`close` is left.
    """

    def __init__(self, images: Images, external: Sequence[str] = (), *, restores: bool = False) -> None:
        self._external = external
        self._work_fd = images.open("work")
        self._inventory_read = self._inventory = -1
        """The pipe from which CRIU reads the inventory of what it shall restore."""
        try:
            if restores:
                self._inventory_read, self._inventory = os.pipe2(os.O_CLOEXEC)
            self._images_fd = images.open_view(self._inventory_read) if restores else images.open("images")
        except BaseException:  # whatever it was: there is no session yet that somebody could close
            _close(self._work_fd, self._inventory_read, self._inventory)
            raise
        self._output_fd = os.memfd_create("criu-output", os.MFD_CLOEXEC)
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._launcher: asyncio.subprocess.Process | None = None
        self._criu: Process | None = None
        self._streams: list[int] = []
        self._withheld = ""
        self._in_last_stage = False
        self._what = "start"
        self.version: tuple[int, ...] = ()
        self.tracks_memory = False
        """Whether this kernel tracks dirty pages, which pre-dump needs."""

    @classmethod
    async def start(
        cls,
        init_pid: int,
        images: Images,
        *,
        cgroup_of: BerthFacts | None = None,
        streams: Sequence[int] = (),
        external: Sequence[str] = (),
        restores: bool = False,
        timeout: float = START_TIMEOUT,
    ) -> CriuSession:
        """Start CRIU in the namespaces of ``init_pid`` and warm it up: its probes of the kernel are cached.

        ``cgroup_of``: join that berth's cgroup, for what CRIU restores is born in its own. ``streams``:
        descriptors it inherits; :meth:`stream` gives the number each has. ``external``: its names of what a dump
        leaves out and a restore must be given. ``restores``: it is for a restore, not for dumps. Raises FerryError
        ``criu_missing``.
        """
        session = cls(images, external, restores=restores)
        try:
            async with asyncio.timeout(timeout):
                await session._start(init_pid, cgroup_of, streams)
        except TimeoutError:
            await session.close()
            raise FerryError("criu_missing", f"CRIU did not answer within {timeout:g} s in the berth.") from None
        except BaseException:  # cancelled too: nobody else could end the CRIU that was started
            await session.close()
            raise
        return session

    async def __aenter__(self) -> CriuSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def work_fd(self) -> int:
        """The work directory, where CRIU leaves its log and its statistics."""
        return self._work_fd

    @property
    def in_last_stage(self) -> bool:
        """Whether a restore has come so far that :meth:`stand_by` is next."""
        return self._in_last_stage

    @property
    def withheld(self) -> str:
        """The notification that CRIU waits at, or an empty string."""
        return self._withheld

    async def pre_dump(self, berth_pid: int, number: int, *, timeout: float) -> None:
        """One pre-copy round into the images' subdirectory ``number``, on top of the one before.

        Raises FerryError ``dirty_tracking_missing`` on a kernel that can't.
        """
        if not self.tracks_memory:
            raise FerryError(
                "dirty_tracking_missing",
                "This kernel does not track dirty pages (CONFIG_MEM_SOFT_DIRTY), so there is no pre-copy.",
                hint="Ask with pre_copy_rounds 0, or run a kernel that has it, such as Debian's own.",
            )
        self._what = "pre-dump"
        request = self._request(rpc.PRE_DUMP, f"pre-dump-{number}.log", subdirectory=str(number))
        request.opts.pid = berth_pid
        request.opts.track_mem = True
        if number > 1:
            request.opts.parent_img = f"../{number - 1}"
        await self._until("", request, timeout)

    async def begin_dump(self, berth_pid: int, *, rounds: int = 0, timeout: float) -> None:
        """Have the dump ready: CRIU has its options and waits at ``pre-dump``, before it looks at any process.

        ``rounds``: how many pre-copy rounds went before.
        """
        self._what = "dump"
        request = self._request(rpc.DUMP, "dump.log")
        request.opts.pid = berth_pid
        request.opts.notify_scripts = True
        if rounds:
            request.opts.track_mem = True
            request.opts.parent_img = str(rounds)
        await self._until("pre-dump", request, timeout)

    async def dump(self, *, timeout: float) -> None:
        """Freeze and dump, up to ``post-dump``: the images are complete, the tasks stay frozen."""
        await self._until("post-dump", self._acknowledgement(True), timeout)

    async def begin_restore(self, inherited: Mapping[str, int]) -> None:
        """Ask for the restore before there are images: CRIU gets ready and waits for the inventory.

        ``inherited``: what CRIU shall connect instead of an outside object of that key, by descriptor of
        ``streams``.
        """
        self._what = "restore"
        request = self._request(rpc.RESTORE, "restore.log")
        request.opts.notify_scripts = True
        for key, fd in inherited.items():
            request.opts.inherit_fd.add(key=key, fd=fd)
        await self._send(request)

    async def restore(self, inventory: bytes, *, timeout: float) -> Process:
        """The images are there: rebuild the process, up to ``post-restore``, where it is whole and has not run.

        Returns the restored root process; the caller closes it. CRIU goes on from there to ``pre-resume``, see
        :meth:`stand_by`.
        """
        with contextlib.suppress(BrokenPipeError):  # CRIU is gone: told below, with its own words
            os.write(self._inventory, inventory)
        self._close_inventory()
        await self._until("post-restore", None, timeout)
        await self._send(self._acknowledgement(True))
        self._withheld, self._in_last_stage = "", True
        restored = self.restored()
        if len(restored) != 1:
            for process in restored:
                process.close()
            raise FerryError("criu_failed", f"CRIU restored {len(restored)} process trees; one is due.")
        return restored[0]

    async def stand_by(self, *, timeout: float) -> None:
        """CRIU's last stage, up to ``pre-resume``: from there only our acknowledgement lets the process run."""
        self._in_last_stage = False
        await self._until("pre-resume", None, timeout)

    def restored(self) -> list[Process]:
        """What CRIU has restored so far: until it exits, the roots are its children."""
        found: list[Process] = []
        if self._criu is not None:
            for child in children(self._criu.pid):
                with contextlib.suppress(ProcessLookupError):
                    found.append(Process(child))
            if not self._criu.alive:  # its PID may be another process's by now, and the children that one's
                for process in found:
                    process.close()
                return []
        return found

    async def finish(self, ok: bool, *, until: str = "", timeout: float) -> None:
        """Acknowledge the withheld notification and see the request through, or up to ``until``.

        At ``post-dump``: True kills the source, False thaws it. At ``pre-resume``: True lets the target run; abort a
        restore with :meth:`kill_restored`.
        """
        try:
            await self._until(until, self._acknowledgement(ok), timeout)
        except FerryError as error:
            # A refused stage is reported by CRIU as a failed request; that is what was asked for.
            if ok or error.code != "criu_failed":
                raise

    async def kill_restored(self) -> None:
        """Abort a restore at any stage: the restored tasks are killed before CRIU could let them go."""
        for process in self.restored():
            with process:
                await process.kill()
        if self._criu is not None:
            # SIGKILL, not a closed socket: that would make CRIU resume what it has restored since.
            await self._criu.kill()
        await self.close()

    async def close(self) -> None:
        """End CRIU and release everything. An unfinished dump thaws its tasks. Safe to repeat."""
        self._close_inventory()  # one that waits for it reads the end of file and gives up
        self._socket.close()
        self._theirs.close()
        if self._launcher is not None:
            try:
                async with asyncio.timeout(EXIT_TIMEOUT):
                    await self._launcher.wait()
            except TimeoutError:
                log.warning("criu_killed", pid=self._launcher.pid, stage=self._what)
                if self._criu is not None:
                    await self._criu.kill()
                with contextlib.suppress(ProcessLookupError):
                    self._launcher.kill()
                await self._launcher.wait()
            self._launcher = None
        if self._criu is not None:
            self._criu.close()
            self._criu = None
        _close(self._images_fd, self._work_fd, self._output_fd, *self._streams)
        self._images_fd = self._work_fd = self._output_fd = -1
        self._streams = []

    async def _start(self, init_pid: int, cgroup_of: BerthFacts | None, streams: Sequence[int]) -> None:
        self._streams = [os.dup(fd) for fd in streams]
        number = self._theirs.fileno()
        # The namespaces of the berth, all but the cgroup namespace: so CRIU dumps no namespace, and what it
        # restores has exactly the target's. --file-validation has no RPC field, the command line has it.
        command = ["nsenter", "-t", str(init_pid), "-m", "-u", "-i", "-n", "-p", "--"]
        command += ["criu", "--file-validation", "filesize", "-W", f"/proc/self/fd/{self._work_fd}"]
        command += ["swrk", str(number)]
        passed = [number, self._images_fd, self._work_fd, self._inventory_read, *self._streams]
        try:
            self._launcher = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._output_fd,
                stderr=self._output_fd,
                pass_fds=[fd for fd in passed if fd >= 0],
                env={"PATH": PATH},
            )
        except FileNotFoundError:
            raise FerryError("machine_unfit", "nsenter is missing.", hint="Install util-linux.") from None
        self._theirs.close()
        _close(self._inventory_read)
        self._inventory_read = -1
        answer = await self._ask(rpc.criu_req(type=rpc.VERSION, keep_open=True))
        self.version = (answer.version.major_number, answer.version.minor_number, answer.version.sublevel)
        if self.version < LEAST_VERSION:
            raise FerryError(
                "criu_missing",
                f"The berth has CRIU {'.'.join(map(str, self.version))}; 4.2 is the least.",
                hint="Build the berths' image anew; it brings its own CRIU.",
            )
        self._criu = Process(children(self._launcher.pid)[0])
        if cgroup_of is not None:
            roots = cgroups.roots(cgroup_of.conmon_pid)
            cgroups.join(self._criu.pid, init_pid, cgroup_of.cgroup_path, roots)
        # Its answer comes from a child that has probed the kernel and cached what it found in /run.
        wanted = rpc.criu_features(mem_track=True)
        answer = await self._ask(rpc.criu_req(type=rpc.FEATURE_CHECK, keep_open=True, features=wanted))
        self.tracks_memory = answer.features.mem_track

    def stream(self, index: int) -> int:
        """The number under which CRIU has the ``index``-th of ``streams``."""
        return self._streams[index]

    def _request(self, kind: rpc.criu_req_type, log_file: str, subdirectory: str = "") -> rpc.criu_req:
        folder = f"/proc/self/fd/{self._images_fd}"
        options = rpc.criu_opts(
            # By path: CRIU resolves a descriptor number as ours, and can't see us from its PID namespace.
            images_dir_fd=-1,
            images_dir=f"{folder}/{subdirectory}" if subdirectory else folder,
            log_level=int(os.environ.get(LOG_LEVEL_VARIABLE, "2")),
            log_file=log_file,
            manage_cgroups_mode=rpc.IGNORE,
            network_lock=rpc.SKIP,
            external=self._external,
        )
        return rpc.criu_req(type=kind, opts=options)

    def _acknowledgement(self, ok: bool) -> rpc.criu_req:
        return rpc.criu_req(type=rpc.NOTIFY, notify_success=ok)

    async def _until(self, script: str, message: rpc.criu_req | None, timeout: float) -> None:
        """Send ``message``, if it is not sent yet; acknowledge every notification before ``script``, or see the
        request's end if empty."""
        try:
            async with asyncio.timeout(timeout):
                self._withheld = ""
                answer = await (self._ask(message) if message is not None else self._receive())
                while answer.type == rpc.NOTIFY:
                    if answer.notify.script == script:
                        self._withheld = script
                        return
                    answer = await self._ask(self._acknowledgement(True))
        except TimeoutError:
            raise FerryError(
                "phase_timeout", f"CRIU's {self._what} took longer than {timeout:g} s.", hint=self._log_hint()
            ) from None
        if not answer.success or script:
            raise criu_errors.failure(self._what, self._log_lines(), answer.cr_errmsg)

    async def _ask(self, message: rpc.criu_req) -> rpc.criu_resp:
        await self._send(message)
        return await self._receive()

    async def _send(self, message: rpc.criu_req) -> None:
        with contextlib.suppress(ConnectionError):  # CRIU is gone: _receive tells, with its own words
            await asyncio.get_running_loop().sock_sendall(self._socket, message.SerializeToString())

    async def _receive(self) -> rpc.criu_resp:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = await asyncio.get_running_loop().sock_recv(self._socket, MAX_PACKET)
        answer = rpc.criu_resp()
        if data:
            try:
                answer.ParseFromString(data)
            except DecodeError as error:
                raise FerryError("criu_failed", f"CRIU's answer can't be read: {error}.") from None
            return answer
        if self.version:
            raise criu_errors.failure(self._what, self._log_lines(), "CRIU ended early")
        raise FerryError(
            "criu_missing",
            f"CRIU did not start in the berth: {' | '.join(self._output()) or 'no reason given'}.",
            hint="The berth's image must have criu on its PATH, and the agent must be privileged.",
        )

    def _close_inventory(self) -> None:
        _close(self._inventory_read, self._inventory)
        self._inventory_read = self._inventory = -1

    def _log_lines(self) -> list[str]:
        name = {"dump": "dump.log", "restore": "restore.log", "pre-dump": ""}.get(self._what, "")
        return (criu_errors.tail(self._work_fd, name) if name else []) or self._output()

    def _log_hint(self) -> str:
        return criu_errors.hint_for(" | ".join(self._log_lines()))

    def _output(self) -> list[str]:
        raw = os.pread(self._output_fd, criu_errors.TAIL_BYTES, 0)
        return criu_errors.important(raw.decode(errors="replace").splitlines())


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


async def outlive(init_pid: int) -> None:
    """Wait until the CRIU of an agent that died has ended, in the berth of ``init_pid``.

    It ends by itself when it finds its client gone, and only then has it let its tasks go.
    Raises FerryError ``phase_timeout`` if it does not.
    """
    for criu in guests(init_pid, "criu"):
        with criu:
            if not await criu.exited(EXIT_TIMEOUT):
                raise FerryError(
                    "phase_timeout",
                    f"An earlier agent's CRIU (PID {criu.pid}) is still at work in the berth.",
                    hint="It ends by itself; if it hangs, end that process.",
                )
