"""The hold: the server gives its socket to the berth's agent, stands still, and gets a socket back.

All of it is synchronous and runs in the event loop's thread: neither timers nor application run meanwhile.
A process that holds no socket cannot send, whatever thaws it. protocol/handover.py has the exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import structlog

from quicferry.protocol import handover, wire
from quicferry.protocol.errors import FerryError
from quicferry.quic.migratable import MigratableUDP
from quicferry.quic.still import STOP, WAKE, Stillness

log = structlog.get_logger(__name__)

COLLECT_AGAIN: Final = 1.0
"""Seconds after a hold until garbage is collected again."""


class Back(msgspec.Struct, frozen=True):
    """What the process finds when it goes on."""

    adopted: handover.Adopted
    still_ms: float
    """How long it stood still, by the wall clock: the monotonic one may have been carried along."""
    queued: int
    """Datagrams that were waiting in the adopted socket."""


def hold(udp: MigratableUDP, migration: str) -> Back:
    """Park the socket, stand still until SIGUSR2, adopt a socket of this migration. Does not return on SIGTERM.

    Raises FerryError ``hold_refused``, with the socket still in use, if no agent takes it.
    """
    name = handover.socket_name(udp.port)
    line = wire.encode(handover.Park(id=migration)) + b"\n"
    collects = gc.isenabled()
    gc.disable()
    with _signals_blocked(), Stillness() as stillness:
        try:
            since = time.time()  # before parking: the freeze may come between any two steps after it
            _park(udp, name, line, stillness)
            adopted, sock = _socket_back(name, migration, stillness)
            queued = udp.adopt(sock, since)
        finally:
            if collects:
                # Not now: a collection takes as long as everything else that the waiting clients wait for.
                asyncio.get_running_loop().call_later(COLLECT_AGAIN, gc.enable)
            # Whoever woke us may have done so twice; the second call is answered by what we did.
            signal.sigtimedwait({WAKE}, 0)
    return Back(adopted=adopted, still_ms=(time.time() - since) * 1000, queued=queued)


def adopt(udp: MigratableUDP) -> handover.Adopted | None:
    """While serving: take a socket if an agent has one parked for us; None if there is no agent or nothing parked."""
    try:
        adopted, sock = _ask(handover.socket_name(udp.port), None)
    except FerryError:
        return None
    udp.adopt(sock)
    return adopted


def agent_waits(udp: MigratableUDP) -> bool:
    """Whether the berth's agent listens for the server: a migration is under way here."""
    with contextlib.suppress(FerryError), _connect(handover.socket_name(udp.port)):
        return True
    return False


def _park(udp: MigratableUDP, name: str, line: bytes, stillness: Stillness) -> None:
    """Hand the socket over and stand still."""
    with _connect(name) as agent:
        sock = udp.release()
        try:
            sent = socket.send_fds(agent, [line], [sock.fileno()])
            if sent != len(line):
                raise OSError("the line was not taken whole")
            # A SIGTERM from before this moment was about the move that is now under way.
            signal.sigtimedwait({STOP}, 0)
            # Both are closed once nothing runs any more; the end of file tells the agent that we hold no socket.
            stillness.wait(sock, agent)
        except OSError as error:
            udp.adopt(sock)
            raise FerryError("hold_refused", f"The berth's agent did not take the socket: {error}.") from None
        except FerryError:
            with contextlib.suppress(OSError):
                agent.sendall(handover.CALLED_OFF)
            udp.adopt(sock)
            raise


class _AnothersError(FerryError):
    """The agent has a socket, but for another migration."""

    def __init__(self, offered: str) -> None:
        super().__init__("hold_refused", f"The agent offers the socket of another migration, {offered}.")


def _socket_back(name: str, migration: str, stillness: Stillness) -> tuple[handover.Adopted, socket.socket]:
    while True:
        end = time.monotonic() + handover.TIMEOUT
        while True:
            try:
                return _ask(name, migration)
            except FerryError as error:
                # For another's sake nobody may go on: by that one's end our own migration may serve elsewhere.
                if isinstance(error, _AnothersError) or time.monotonic() >= end:
                    # Without a socket we are mute, which is the safe side: wait to be woken again.
                    log.error("adopt_failed", id=migration, code=error.code, reason=error.message)
                    break
                time.sleep(0.005)
        with contextlib.suppress(FerryError):  # a thread can't be halted: still mute, and still asking
            stillness.wait()


def _connect(name: str) -> socket.socket:
    agent = None
    try:
        agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        agent.settimeout(handover.TIMEOUT)
        agent.connect(name)
    except OSError as error:
        if agent is not None:
            agent.close()
        raise FerryError(
            "hold_refused",
            f"Nobody takes the socket over: {error.strerror or error}.",
            hint="The berth's agent listens while a migration runs; is one running here?",
        ) from None
    return agent


def _ask(name: str, migration: str | None) -> tuple[handover.Adopted, socket.socket]:
    """One ``adopt`` exchange; with ``migration``, only its socket is taken. Raises FerryError ``hold_refused``."""
    with _connect(name) as agent:
        received, fds = bytearray(), list[int]()
        try:
            agent.sendall(wire.encode(handover.Adopt(id=migration)) + b"\n")
            while b"\n" not in received and len(received) <= handover.MAX_LINE_BYTES and len(fds) <= 1:
                data, more, _, _ = socket.recv_fds(agent, handover.MAX_LINE_BYTES, 4)
                fds += more
                if not data:
                    break
                received += data
            adopted: handover.Adopted = wire.decode(bytes(received).partition(b"\n")[0], handover.Adopted)
            if migration not in (None, adopted.id):
                raise _AnothersError(adopted.id)
            if len(fds) != 1:
                raise FerryError("hold_refused", f"The agent answered with {len(fds)} sockets instead of one.")
            sock = socket.socket(fileno=fds[0])
            fds.clear()
        except OSError as error:
            raise FerryError("hold_refused", f"The agent gave no socket: {error}.") from None
        except _AnothersError:
            raise
        except FerryError as error:
            raise FerryError("hold_refused", f"The agent gave no socket: {error.message}") from None
        finally:
            for fd in fds:
                os.close(fd)
    if sock.type != socket.SOCK_DGRAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        sock.close()
        raise FerryError("hold_refused", "The agent gave a socket that is not UDP.")
    return adopted, sock


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {WAKE, STOP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
