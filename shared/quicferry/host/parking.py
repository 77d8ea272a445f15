"""The parked socket, and the dock: the hand-over listener in a berth's network namespace.

A dock is open for one migration at one berth. At the source it takes the server's UDP socket (``park``);
at the target it holds a socket bound before the dump. Either way it hands the socket out once, to one
expected process (``adopt``). See protocol/handover.py for the exchange, unix(7) for SCM_RIGHTS and
SO_PEERCRED.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, TypeVar

import structlog

from quicferry.protocol import handover, wire
from quicferry.protocol.errors import FerryError

T = TypeVar("T")
log = structlog.get_logger(__name__)

CLONE_NEWNET: Final = 0x40000000
SO_RCVBUFFORCE: Final = 33
SO_MEMINFO: Final = 55
QUEUE_BYTES: Final = 8 * 1024 * 1024
"""Receive buffer of a parked socket: all that clients send during the pause must fit."""
BACKLOG: Final = 8
ACCEPT_AGAIN: Final = 0.05
DUE_SOCKETS: Final = 1
"""With one line; a peer that sends more is refused before it fills our table of descriptors."""
_UCRED: Final = struct.Struct("iII")


def in_network_of(pid: int, function: Callable[[], T]) -> T:
    """Run ``function`` in the network namespace of ``pid`` and return what it returns.

    setns(2) moves a thread, not a process: it is done in a thread of its own, which ends with it.
    Raises what ``function`` raises; FerryError ``berth_gone`` if ``pid`` has exited.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread, all of it
            failure.append(error)

    thread = threading.Thread(target=run, name="quicferry-setns")
    thread.start()
    thread.join()
    if failure:
        if isinstance(failure[0], FileNotFoundError | ProcessLookupError):
            raise FerryError("berth_gone", f"The berth's init (PID {pid}) has exited.") from None
        raise failure[0]
    return outcome[0]


def bind_parked(init_pid: int, port: int) -> socket.socket:
    """Bind the service's UDP port in the berth and let it queue what arrives.

    Raises FerryError ``port_taken``, ``berth_gone``.
    """

    def bind() -> socket.socket:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            _grow(udp)
            # The server tells by it what has come before the pause and what in it (socket(7)).
            udp.setsockopt(socket.SOL_SOCKET, handover.SO_TIMESTAMPNS, 1)
            # No SO_REUSEPORT: two sockets with it would split what arrives.
            udp.bind(("0.0.0.0", port))  # noqa: S104 - inside the berth; restores anywhere
        except BaseException:
            udp.close()
            raise
        return udp

    try:
        return in_network_of(init_pid, bind)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise FerryError(
            "port_taken",
            f"UDP port {port} is in use inside the target berth.",
            hint="Stop what listens there: ss -ulpn in the berth shows it.",
        ) from None


def queued_bytes(udp: socket.socket) -> int:
    """The kernel's account of what waits in the receive queue, overhead included (SO_MEMINFO)."""
    raw = udp.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4)
    return int(struct.unpack("I", raw)[0])


class Dock:
    """Listens for one server. Open it with :meth:`open`, always close it."""

    def __init__(self, listener: socket.socket, port: int, init_pid: int) -> None:
        self.init_pid = init_pid
        """Of the berth whose network namespace it is in, and goes with."""
        self._listener = listener
        self._port = port
        self._expected = 0
        self.parked_for: str | None = None
        """The migration for which the server says that it parks, if it says."""
        self._answer: handover.Adopted | None = None
        self._giving: Callable[[], None] | None = None
        self._udp: socket.socket | None = None
        self._stopped = False
        self._parked = asyncio.Event()
        self._adopted = asyncio.Event()
        self._task = asyncio.create_task(self._serve(), name=f"dock-{port}")

    @classmethod
    def open(cls, init_pid: int, port: int, *, udp: socket.socket | None = None) -> Dock:
        """Listen in the berth of ``init_pid``; ``udp`` is what to hand out, if it is there already.

        Raises FerryError ``port_taken`` if another agent listens there, ``berth_gone``.
        """

        def listen() -> socket.socket:
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                unix.bind(handover.socket_name(port))
                unix.listen(BACKLOG)
            except BaseException:
                unix.close()
                raise
            return unix

        try:
            listener = in_network_of(init_pid, listen)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise FerryError(
                "port_taken",
                f"Another agent already waits for the server on port {port} in this berth.",
                hint="One checkpoint agent and one restore agent a node; stop the other.",
            ) from None
        dock = cls(listener, port, init_pid)
        dock._udp = udp
        return dock

    def expect(self, pid: int) -> None:
        """Only the process ``pid`` may park or adopt; nobody may before this call."""
        self._expected = pid

    def offer(
        self,
        answer: handover.Adopted,
        udp: socket.socket | None = None,
        *,
        giving: Callable[[], None] | None = None,
    ) -> None:
        """Let the expected process adopt the socket held, or ``udp`` instead; ``giving`` is called right before."""
        if udp is not None:
            self._drop()
            self._udp = udp
        self._answer = answer
        self._giving = giving

    @property
    def parked(self) -> bool:
        """Whether the server has given up its socket, completely."""
        return self._parked.is_set()

    @property
    def holds_socket(self) -> bool:
        return self._udp is not None

    @property
    def queued_bytes(self) -> int:
        return queued_bytes(self._udp) if self._udp is not None else 0

    async def wait_parked(self) -> None:
        """Until the server holds no socket any more. Bound it with asyncio.timeout."""
        await self._parked.wait()

    async def wait_adopted(self) -> None:
        """Until the expected process has the socket. Bound it with asyncio.timeout."""
        await self._adopted.wait()

    async def stop_parking(self) -> None:
        """Refuse new connections and finish those that got in: afterwards :attr:`parked` is final.

        A server that can't connect calls its move off, so closing must not lose one that did connect:
        shutdown(2) refuses the new, the backlog is still served.
        """
        self._stopped = True
        self._listener.shutdown(socket.SHUT_RDWR)
        await self._task

    def take(self) -> socket.socket | None:
        """The socket held, now the caller's."""
        udp, self._udp = self._udp, None
        return udp

    async def close(self) -> None:
        """Stop listening and close the socket held, if it was not handed out. Safe to repeat."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._listener.close()
        self._drop()

    def _drop(self) -> None:
        if self._udp is not None:
            self._udp.close()
            self._udp = None

    async def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                # A non-blocking accept(2) says so of a shut down listener too, while epoll calls it ready.
                if self._stopped:
                    return
                await readable(self._listener)
                continue
            except OSError as error:  # no descriptor left
                log.warning("handover_failed", port=self._port, error=str(error))
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            with connection:
                connection.setblocking(False)
                try:
                    async with asyncio.timeout(handover.TIMEOUT):
                        await self._exchange(connection)
                except (TimeoutError, OSError, FerryError) as error:
                    log.warning("handover_failed", port=self._port, error=str(error) or type(error).__name__)

    async def _exchange(self, connection: socket.socket) -> None:
        pid, _, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if pid != self._expected:
            log.warning("handover_refused", port=self._port, pid=pid, expected=self._expected)
            return
        line, received = await _receive_line(connection)
        try:
            request = wire.decode(line, handover.Request)
            if isinstance(request, handover.Park):
                await self._park(connection, request.id, received)
            else:
                self._adopt(connection, request)
        finally:
            for udp in received:
                udp.close()

    async def _park(self, connection: socket.socket, migration: str | None, received: list[socket.socket]) -> None:
        if len(received) != 1 or received[0].type != socket.SOCK_DGRAM:
            raise FerryError("bad_request", f"park came with {len(received)} sockets; one UDP socket is due.")
        # Kept from here on, whatever follows: the server may have closed its own already.
        self._drop()
        self._udp = received.pop()
        self.parked_for = migration
        with contextlib.suppress(OSError):
            _grow(self._udp)
        # Only at end of file has the server closed its own copy: before it, it could still send.
        if await asyncio.get_running_loop().sock_recv(connection, len(handover.CALLED_OFF)):
            self._drop()
            raise FerryError("hold_refused", "The server called the hand-over off.")
        self._parked.set()

    def _adopt(self, connection: socket.socket, request: handover.Adopt) -> None:
        if self._answer is None or self._udp is None:
            raise FerryError("bad_request", "adopt came while there is nothing to adopt.")
        line = wire.encode(self._answer) + b"\n"
        if request.id not in (None, self._answer.id):
            # Whether that one's other copy serves is not ours to know: its own agent must wake it.
            connection.send(line)
            log.warning("adopt_refused", port=self._port, id=self._answer.id, held_for=request.id)
            return
        if self._giving is not None:
            self._giving()
        # One small message into an empty stream socket: it is sent whole or not at all.
        socket.send_fds(connection, [line], [self._udp.fileno()])
        self._drop()
        self._adopted.set()


async def _receive_line(connection: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """One line and the socket that came with it, if one did.

    Raises FerryError ``bad_request``; OSError if what came is no socket.
    """
    line = b""
    received: list[int] = []
    try:
        while not line.endswith(b"\n"):
            await readable(connection)
            try:
                data, fds, flags, _ = socket.recv_fds(
                    connection, handover.MAX_LINE_BYTES, DUE_SOCKETS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            received += fds
            # What finds no room is closed by the kernel, and MSG_CTRUNC is all that is seen of it.
            if len(received) > DUE_SOCKETS or flags & socket.MSG_CTRUNC:
                raise FerryError("bad_request", "More sockets came than the one that is due.")
            if not data:
                raise FerryError("bad_request", "The connection ended within its line.")
            line += data
            if len(line) > handover.MAX_LINE_BYTES:
                raise FerryError("bad_request", f"A line of more than {handover.MAX_LINE_BYTES} bytes.")
        return line, [socket.socket(fileno=fd) for fd in received]
    except BaseException:
        for fd in received:
            os.close(fd)
        raise


async def readable(file: socket.socket | int) -> None:
    """Until ``file``, a socket or a descriptor, has something to read. Bound it with asyncio.timeout."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(file, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(file)


def _grow(udp: socket.socket) -> None:
    if udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < QUEUE_BYTES:
        udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE_BYTES)


def _setns(fd: int, kind: int) -> None:
    # os.setns exists from Python 3.12; the C library's has always been there.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
