"""The dock, over a real abstract unix socket with real sockets handed through it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from quicferry.host.parking import Dock, queued_bytes, readable
from quicferry.protocol import handover, wire
from quicferry.protocol.api import Address

_ports = itertools.count(1)

MOVED = handover.Adopted(
    id="m1", outcome="moved", node="local", berth="b", address=Address(host="127.0.0.1", port=4242), epoch=3
)


@pytest_asyncio.fixture
async def dock() -> AsyncIterator[Dock]:
    port = next(_ports)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(f"{handover.socket_name(port)}.{os.getpid()}")
    listener.listen(8)
    made = Dock(listener, port, os.getpid())
    yield made
    await made.close()


@pytest.fixture
def udp() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        yield made


@contextlib.contextmanager
def visit(dock: Dock) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.connect(dock._listener.getsockname())
        unix.setblocking(False)
        yield unix


async def ended(unix: socket.socket) -> bytes:
    """All that comes until the dock hangs up."""
    loop, data = asyncio.get_running_loop(), b""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):  # it did not read all that was sent
            while more := await loop.sock_recv(unix, 4096):
                data += more
    return data


async def parked(dock: Dock) -> None:
    async with asyncio.timeout(10):
        await dock.wait_parked()


def park(unix: socket.socket, *sockets: socket.socket) -> None:
    socket.send_fds(unix, [wire.encode(handover.Park(id="m1")) + b"\n"], [one.fileno() for one in sockets])


async def test_a_socket_is_parked_only_when_its_owner_has_hung_up(dock: Dock, udp: socket.socket) -> None:
    dock.expect(os.getpid())
    with visit(dock) as unix:
        park(unix, udp)
        async with asyncio.timeout(10):
            while not dock.holds_socket:  # noqa: ASYNC110 - the dock announces only what is complete
                await asyncio.sleep(0)
        assert not dock.parked
    await parked(dock)


async def test_a_parked_socket_is_handed_out_once_queue_and_all(dock: Dock, udp: socket.socket) -> None:
    address = udp.getsockname()
    dock.expect(os.getpid())
    with visit(dock) as unix:
        park(unix, udp)
    udp.close()
    await parked(dock)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"sent meanwhile", address)
    assert dock.queued_bytes > 0
    with visit(dock) as early:
        early.send(b'{"op":"adopt"}\n')
        assert await ended(early) == b""  # nothing is offered yet
    dock.offer(MOVED)
    with visit(dock) as unix:
        unix.send(b'{"op":"ad')
        unix.send(b'opt"}\n')
        async with asyncio.timeout(10):
            await dock.wait_adopted()
        line, fds, _, _ = socket.recv_fds(unix, 4096, 1)
    assert wire.decode(line, handover.Adopted) == MOVED
    assert line.endswith(b"\n")
    with socket.socket(fileno=fds[0]) as adopted:
        assert adopted.getsockname() == address
        assert adopted.recv(100) == b"sent meanwhile"
    with visit(dock) as late:
        late.send(b'{"op":"adopt"}\n')
        assert await ended(late) == b""
    assert not dock.holds_socket


async def test_who_is_held_for_another_migration_gets_no_socket(dock: Dock, udp: socket.socket) -> None:
    dock.expect(os.getpid())
    dock.offer(MOVED, udp.dup())
    with visit(dock) as unix:
        unix.send(wire.encode(handover.Adopt(id="m2")) + b"\n")
        await readable(unix)
        line, fds, _, _ = socket.recv_fds(unix, 4096, 1)
    assert (wire.decode(line, handover.Adopted), fds) == (MOVED, [])
    assert dock.holds_socket
    with visit(dock) as unix:
        unix.send(wire.encode(handover.Adopt(id="m1")) + b"\n")
        async with asyncio.timeout(10):
            await dock.wait_adopted()
        _, fds, _, _ = socket.recv_fds(unix, 4096, 1)
    with socket.socket(fileno=fds[0]) as adopted:
        assert adopted.getsockname() == udp.getsockname()


async def test_nobody_else_may_park_or_adopt(dock: Dock, udp: socket.socket) -> None:
    dock.offer(MOVED, udp.dup())
    for expected in (0, os.getpid() + 1):
        dock.expect(expected)
        with visit(dock) as unix:
            unix.send(b'{"op":"adopt"}\n')
            assert await ended(unix) == b""
    assert dock.holds_socket
    assert not dock.parked


@pytest.mark.parametrize(
    "line",
    [
        b"park\n",
        b"\xff\xfe\n",
        b'{"op":"other"}\n',
        b'{"op":"park","id":"a b"}\n',
        b'{"op":"park","id":"m1"}\n',  # without a socket
        b"x" * (handover.MAX_LINE_BYTES + 1),
    ],
)
async def test_a_bad_line_ends_its_connection_only(dock: Dock, udp: socket.socket, line: bytes) -> None:
    dock.expect(os.getpid())
    with visit(dock) as unix:
        unix.send(line)
        unix.shutdown(socket.SHUT_WR)
        assert await ended(unix) == b""
    assert not dock.parked
    with visit(dock) as unix:
        park(unix, udp)
    await parked(dock)


async def test_only_one_datagram_socket_is_taken(dock: Dock, udp: socket.socket) -> None:
    dock.expect(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        for sockets in ((udp, udp), (tcp,)):
            with visit(dock) as unix:
                park(unix, *sockets)
                assert await ended(unix) == b""
    assert not dock.parked
    assert len(os.listdir("/proc/self/fd")) == before


async def test_more_descriptors_than_are_due_are_refused_at_once(dock: Dock, udp: socket.socket) -> None:
    """A few with each byte, while the line goes on: they would be kept until it ends."""
    dock.expect(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    with capture_logs() as logged, visit(dock) as unix:
        for _ in range(3):
            with contextlib.suppress(BrokenPipeError):  # it has hung up already
                socket.send_fds(unix, [b" "], [udp.fileno()])
        assert await ended(unix) == b""
    assert [line["error"].partition(":")[0] for line in logged] == ["bad_request"]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_descriptor_too_many_is_seen_although_the_kernel_drops_it(dock: Dock, udp: socket.socket) -> None:
    dock.expect(os.getpid())
    dock.offer(MOVED, udp.dup())
    with capture_logs() as logged, visit(dock) as unix:
        socket.send_fds(unix, [b'{"op":"adopt"}\n'], [udp.fileno()] * 2)
        assert await ended(unix) == b""
    assert [line["error"].partition(":")[0] for line in logged] == ["bad_request"]
    assert dock.holds_socket


async def test_a_descriptor_that_is_no_socket_is_closed(dock: Dock, udp: socket.socket) -> None:
    dock.expect(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    with visit(dock) as unix:
        file = os.open(os.devnull, os.O_RDONLY)
        socket.send_fds(unix, [b'{"op":"adopt"}\n'], [file])
        os.close(file)
        assert await ended(unix) == b""
    assert len(os.listdir("/proc/self/fd")) == before
    with visit(dock) as unix:
        park(unix, udp)
    await parked(dock)


async def test_who_got_in_before_parking_stopped_is_still_served(dock: Dock, udp: socket.socket) -> None:
    dock.expect(os.getpid())
    # The dock's task has not run yet: connection, line and end of file all wait in the backlog.
    with visit(dock) as unix:
        park(unix, udp)
    await dock.stop_parking()
    assert dock.parked
    with pytest.raises(ConnectionRefusedError), visit(dock):
        pass
    taken = dock.take()
    assert taken is not None
    with taken:
        assert taken.getsockname() == udp.getsockname()
    assert not dock.holds_socket


async def test_parking_stops_when_nobody_came(dock: Dock) -> None:
    async with asyncio.timeout(10):
        await dock.stop_parking()
    assert not dock.parked


async def test_closing_closes_what_was_not_handed_out(dock: Dock, udp: socket.socket) -> None:
    copy = udp.dup()
    dock.offer(MOVED, copy)
    await dock.close()
    await dock.close()
    assert copy.fileno() == -1


def test_an_empty_queue_has_no_bytes(udp: socket.socket) -> None:
    assert queued_bytes(udp) == 0
