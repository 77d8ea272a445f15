"""The hand-over of the parked socket: its messages, and agents that answer badly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from quicferry.protocol import handover, wire
from quicferry.protocol.api import Address
from quicferry.protocol.errors import FerryError
from quicferry.quic import hold
from quicferry.quic.migratable import CONTROL_BYTES, SINGLY, MigratableUDP, _came_at

ADOPTED = handover.Adopted(
    id="m", outcome="moved", node="n", berth="b", address=Address(host="192.0.2.1", port=4242), epoch=1
)
LINE = wire.encode(ADOPTED) + b"\n"


def test_the_lines_as_the_agents_see_them() -> None:
    assert wire.encode(handover.Park(id="m")) == b'{"op":"park","id":"m"}'
    assert wire.encode(handover.Adopt()) == b'{"op":"adopt"}'
    assert wire.encode(handover.Adopt(id="m")) == b'{"op":"adopt","id":"m"}'
    assert wire.decode(b'{"op":"adopt"}', handover.Request) == handover.Adopt()
    assert wire.decode(LINE.strip(), handover.Adopted) == ADOPTED
    assert handover.socket_name(4242) == "\0quicferry.parking.4242"


def test_without_a_descriptor_for_it_the_agent_is_asked_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an OSError it would have let a server go on that holds no socket."""

    def none_left(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(hold.socket, "socket", none_left)
    with pytest.raises(FerryError) as caught:
        hold._connect("\0quicferry.test.nobody")
    assert caught.value.code == "hold_refused"


class BadAgent:
    """Takes one connection and answers it in its own way, in a thread."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.name = f"\0quicferry.test.{os.getpid()}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.name)
        self._listener.listen(1)
        self._listener.settimeout(5)
        self._answer = answer
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.recv(100)
            self._answer(connection)

    def __enter__(self) -> BadAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def send(*socks: socket.socket, line: bytes = LINE) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [line], [sock.fileno() for sock in socks])

    return answer


@pytest.fixture
def open_fds() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("open_fds")
def test_a_good_answer() -> None:
    with udp() as given, BadAgent(send(given)) as agent:
        adopted, sock = hold._ask(agent.name, "m")
        with sock:
            assert adopted == ADOPTED
            assert sock.getsockname() == given.getsockname()


@pytest.mark.usefixtures("open_fds")
def test_a_good_answer_in_pieces() -> None:
    def answer(connection: socket.socket) -> None:
        socket.send_fds(connection, [LINE[:20]], [given.fileno()])
        connection.sendall(LINE[20:])

    with udp() as given, BadAgent(answer) as agent:
        adopted, sock = hold._ask(agent.name, "m")
        sock.close()
        assert adopted == ADOPTED


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda connection: None, "Not valid JSON"),
        (lambda connection: connection.sendall(LINE), "0 sockets"),
        (lambda connection: connection.sendall(b"\xff\xfe\n"), "Not valid JSON"),
        (lambda connection: connection.sendall(b'{"op":"adopted"}\n'), "missing required field"),
        (lambda connection: connection.sendall(b"x" * 20_000), "Not valid JSON|gave no socket"),
        (lambda connection: send(connection, connection)(connection), "2 sockets"),
        (lambda connection: send(connection)(connection), "not UDP"),
        (lambda connection: send(connection, line=b"{}\n")(connection), "missing required field"),
    ],
)
def test_bad_answers_are_refused_and_leak_nothing(answer: Callable[[socket.socket], None], reason: str) -> None:
    with BadAgent(answer) as agent, pytest.raises(FerryError, match=reason) as caught:
        hold._ask(agent.name, "m")
    assert caught.value.code == "hold_refused"


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize("count", [0, 1, 3])
def test_anothers_socket_is_refused_and_closed(count: int) -> None:
    """An agent that can't tell sends the socket; one that can, the line alone."""
    others = wire.encode(replace(ADOPTED, id="m2")) + b"\n"
    with udp() as given, BadAgent(send(*[given] * count, line=others)) as agent:
        with pytest.raises(FerryError, match="another migration, m2") as caught:
            hold._ask(agent.name, "m")
        assert caught.value.code == "hold_refused"


@pytest.mark.usefixtures("open_fds")
def test_a_server_that_serves_takes_any_socket() -> None:
    with udp() as given, BadAgent(send(given)) as agent:
        adopted, sock = hold._ask(agent.name, None)
        sock.close()
        assert adopted == ADOPTED


async def test_a_refused_hold_leaves_everything_as_it_was() -> None:
    """Nobody listens: same socket, same signal mask, and datagrams still arrive."""
    got: asyncio.Queue[bytes] = asyncio.Queue()
    endpoint = MigratableUDP.bind("127.0.0.1", 0, lambda data, peer: got.put_nowait(data))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    generation = endpoint.generation
    with pytest.raises(FerryError) as caught:
        hold.hold(endpoint, "m")
    assert caught.value.code == "hold_refused"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert endpoint.generation == generation
    with udp() as sender:
        sender.sendto(b"hello", ("127.0.0.1", endpoint.port))
        async with asyncio.timeout(5):
            assert await got.get() == b"hello"
    endpoint.close()


class Received(list[bytes]):
    """What an endpoint hands up; ``all`` is set once there are so many."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.all = asyncio.Event()

    def __call__(self, data: bytes, peer: object) -> None:
        self.append(data)
        if len(self) == self.expected:
            self.all.set()


async def test_everything_queued_is_read_from_adoption_on() -> None:
    got = Received(200)
    endpoint = MigratableUDP.bind("127.0.0.1", 0, got)
    released = endpoint.release()
    with pytest.raises(OSError, match="given away"):
        endpoint.release()
    endpoint.sendto(b"kept", released.getsockname())  # nowhere to go yet: kept, and no error
    assert endpoint.counters.sent == 0
    with udp() as sender:
        parked = udp()
        for number in range(200):
            sender.sendto(b"%d" % number, parked.getsockname())
        assert endpoint.adopt(parked) == 200
        assert len(got) >= 1, "the first are read at once"
        assert len(got) < 200, "and the application runs before all are"
        async with asyncio.timeout(5):
            await got.all.wait()
        assert got == [b"%d" % number for number in range(200)]
        assert endpoint.counters.sent == 1
    released.close()
    endpoint.close()


@contextlib.contextmanager
def arrivals_noted() -> Iterator[None]:
    """While it lasts the kernel notes when a datagram arrives: it begins to a moment after the first socket has asked
    for it (net_enable_timestamp()), and until then gives the time when the datagram is read."""
    with udp() as sender, udp() as witness:
        witness.setsockopt(socket.SOL_SOCKET, handover.SO_TIMESTAMPNS, 1)
        for _ in range(100_000):
            sender.sendto(b"?", witness.getsockname())
            sent = time.time()
            if _came_at(witness.recvmsg(1, CONTROL_BYTES)[1]) <= sent:
                break
        else:
            pytest.fail("this kernel notes no arrivals")
        yield


async def test_what_came_before_the_pause_is_read_last() -> None:
    got = Received(200)
    endpoint = MigratableUDP.bind("127.0.0.1", 0, got)
    endpoint.release().close()
    with arrivals_noted(), udp() as sender:
        parked = udp()
        parked.setsockopt(socket.SOL_SOCKET, handover.SO_TIMESTAMPNS, 1)
        for number in range(199):
            sender.sendto(b"%d" % number, parked.getsockname())
        since = time.time()
        sender.sendto(b"in the pause", parked.getsockname())
        assert endpoint.adopt(parked, since) == 200
        assert got == [b"in the pause"], "the application has not had its turn"
        async with asyncio.timeout(5):
            await got.all.wait()
        assert got[1:] == [b"%d" % number for number in range(199)]
    endpoint.close()


async def test_what_arrives_while_the_queue_is_taken_waits_behind_it() -> None:
    """Acknowledged out of order, what is still queued looks lost to the client and costs its congestion window."""
    got = Received(42)
    endpoint = MigratableUDP.bind("127.0.0.1", 0, got)
    endpoint.release().close()
    with udp() as sender:
        parked = udp()
        for number in range(40):
            sender.sendto(b"%d" % number, parked.getsockname())
        assert endpoint.adopt(parked) == 40
        sender.sendto(b"40", parked.getsockname())
        await asyncio.sleep(0)
        sender.sendto(b"41", parked.getsockname())
        async with asyncio.timeout(5):
            await got.all.wait()
    assert got == [b"%d" % number for number in range(42)]
    endpoint.close()


async def test_the_application_answers_each_of_the_first_before_the_next_is_taken() -> None:
    seen: list[str] = []
    all_answered = asyncio.Event()
    loop = asyncio.get_running_loop()

    def answered(number: str) -> None:
        seen.append(f"{number} answered")
        if len(seen) == 2 * SINGLY:
            all_answered.set()

    def received(data: bytes, peer: object) -> None:
        """As the stack does: the application is woken, and what it writes leaves in the turn after."""
        number = data.decode()
        seen.append(f"{number} came")
        loop.call_soon(loop.call_soon, answered, number)

    endpoint = MigratableUDP.bind("127.0.0.1", 0, received)
    endpoint.release().close()
    with udp() as sender:
        parked = udp()
        for number in range(SINGLY):
            sender.sendto(b"%d" % number, parked.getsockname())
        endpoint.adopt(parked)
        async with asyncio.timeout(5):
            await all_answered.wait()
    assert seen == [word for number in range(SINGLY) for word in (f"{number} came", f"{number} answered")]
    endpoint.close()


async def test_what_the_old_socket_had_received_is_read_in_a_rebind() -> None:
    got: list[bytes] = []
    endpoint = MigratableUDP.bind("127.0.0.1", 0, lambda data, peer: got.append(data))
    with udp() as sender:
        sender.sendto(b"before", ("127.0.0.1", endpoint.port))
        endpoint.rebind()
        assert got == [b"before"]
        assert endpoint.port == endpoint.local[1]
    endpoint.close()


async def test_a_swap_from_within_a_datagrams_handling() -> None:
    """The read loop has the old socket in hand when it is exchanged and closed under it."""
    got: list[bytes] = []
    seen = asyncio.Event()

    def received(data: bytes, peer: object) -> None:
        got.append(data)
        endpoint.rebind()
        endpoint.sendto(data, peer)
        if len(got) == 10:
            seen.set()

    endpoint = MigratableUDP.bind("127.0.0.1", 0, received)
    with udp() as sender:
        sender.settimeout(5)
        for number in range(10):
            sender.sendto(b"%d" % number, ("127.0.0.1", endpoint.port))
        async with asyncio.timeout(5):
            await seen.wait()
        assert sorted(got) == [b"%d" % number for number in range(10)]
        assert sorted(sender.recv(10) for _ in range(10)) == sorted(got)
    assert endpoint.counters.send_errors == 0
    endpoint.close()


async def test_a_write_caught_in_a_swap_goes_out_by_the_new_socket() -> None:
    """A thread writes while the loop swaps: what fails on a closed socket is retried by generation."""
    endpoint = MigratableUDP.bind("127.0.0.1", 0, lambda data, peer: None)
    sink = udp()
    peer = sink.getsockname()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            endpoint._send(b"x", peer)

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(300):
        endpoint.rebind()
        await asyncio.sleep(0)
    stop.set()
    thread.join()
    assert endpoint.counters.sent > 0
    assert endpoint.counters.send_errors == 0
    endpoint.close()
    sink.close()


async def test_errors_of_the_network_stay_below() -> None:
    """Nobody listens there: the kernel says ECONNREFUSED or the like, QUIC is told nothing."""
    endpoint = MigratableUDP.bind("127.0.0.1", 0, lambda data, peer: None)
    with udp() as gone:
        nobody = gone.getsockname()
    for _ in range(5):
        endpoint.sendto(b"x", nobody)
        endpoint.sendto(b"x", ("255.255.255.255", 9))  # EACCES
        endpoint.sendto(b"x" * 70_000, nobody)  # EMSGSIZE
    assert endpoint.counters.send_errors == 10
    endpoint.close()
    endpoint.sendto(b"x", nobody)
    endpoint.close()
