"""What a peer can make us keep, whatever it sends; two connections in memory, one of which attacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from aioquic import tls
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicErrorCode, QuicStreamFrame
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.stream import QuicStream

from quicferry.quic import internals
from tests.unit.test_control_internals import CLIENT, SERVER, pair

MIB = 1024 * 1024
ROUNDS = 40
"""In 17 of them aioquic's own limits grow to 128 GiB."""
STREAMS = 128
"""That aioquic lets a peer have open at once."""


@dataclass
class Left:
    unread: int = 0


class Attack:
    """``attacker`` is plain aioquic, ``victim`` is bounded; nothing that the victim sends is lost."""

    def __init__(self, folder: Path, victim: str) -> None:
        client, server = pair(folder)
        self.victim, self.attacker = (server, client) if victim == "server" else (client, server)
        self.left: dict[int, Left] = {}
        internals.bound_receiving(self.victim, self.left)
        self.now = 1.0
        self.sent = self.arrived = 0
        self.events: list[QuicEvent] = []

    @property
    def kept(self) -> int:
        """Bytes in the victim's buffers."""
        return sum(len(stream.receiver._buffer) for stream in self.victim._streams.values())

    def stream(self) -> QuicStream:
        return self.attacker._streams[internals.reserve_stream(self.attacker)]

    def name_the_highest(self, stream: QuicStream) -> bool:
        """Send the last byte that the limits allow, and nothing before it; whether they allow one."""
        sender = stream.sender
        room = self.attacker._remote_max_data - self.attacker._remote_max_data_used
        highest = min(stream.max_stream_data_remote, sender.highest_offset + room)
        if highest <= sender.highest_offset:
            return False
        sender._buffer.clear()
        sender._buffer_start = sender._buffer_stop = highest - 1
        sender._pending = RangeSet()
        sender.write(b"x")
        return True

    def turn(self, lost: int = 0) -> None:
        """A bit of time, and what both have to send; of each ``lost`` datagrams one is lost."""
        self.now += 0.02
        for quic in (self.victim, self.attacker):
            if quic.get_timer() is not None:  # it has not ended
                quic.handle_timer(now=self.now)
        for one, other in ((self.attacker, self.victim), (self.victim, self.attacker)):
            for data, _ in one.datagrams_to_send(now=self.now):
                self.sent += 1
                if not lost or self.sent % lost:
                    other.receive_datagram(data, CLIENT if one._is_client else SERVER, now=self.now)
            while (event := self.victim.next_event()) is not None:
                self.events.append(event)
                if isinstance(event, StreamDataReceived):
                    self.arrived += len(event.data)
                    if (left := self.left.get(event.stream_id)) is not None:
                        left.unread += len(event.data)

    def send(self, stream: QuicStream, size: int, lost: int = 0) -> int:
        """Bytes that arrive of so many that are sent, in order, until no more do."""
        assert stream.stream_id is not None
        self.attacker.send_stream_data(stream.stream_id, bytes(size))
        before, idle = self.arrived, 0
        while self.arrived < before + size and idle < 500:
            last = self.arrived
            self.turn(lost)
            idle = 0 if self.arrived > last else idle + 1
        return self.arrived - before


@pytest.fixture(params=["server", "client"])
def attack(request: pytest.FixtureRequest, tmp_path: Path) -> Attack:
    return Attack(tmp_path, request.param)


def test_what_is_named_and_not_sent_raises_no_limit(attack: Attack) -> None:
    """aioquic issue 589."""
    stream = attack.stream()
    for _ in range(ROUNDS):
        attack.name_the_highest(stream)
        attack.turn()
    assert 0 < attack.kept <= MIB
    assert stream.max_stream_data_remote == MIB
    assert attack.attacker._remote_max_data == MIB


def test_many_streams_share_one_bound(attack: Attack) -> None:
    streams = [attack.stream() for _ in range(STREAMS)]
    for _ in range(ROUNDS):
        for stream in streams:
            attack.name_the_highest(stream)
        attack.turn()
    assert 0 < attack.kept <= MIB


def test_who_has_sent_much_gets_the_largest_window_and_no_more(attack: Attack) -> None:
    stream = attack.stream()
    assert attack.send(stream, 12 * MIB) == 12 * MIB
    streams = [stream, *(attack.stream() for _ in range(STREAMS - 1))]
    for _ in range(ROUNDS):
        for each in streams:
            attack.name_the_highest(each)
        attack.turn()
        assert len(attack.victim._streams[stream.stream_id or 0].receiver._buffer) <= internals.STREAM_WINDOW
        assert attack.kept <= internals.CONNECTION_WINDOW
    assert attack.kept > internals.STREAM_WINDOW  # the attack is one


def test_a_reset_gives_the_memory_back_with_the_limit(attack: Attack) -> None:
    for _ in range(STREAMS):
        stream = attack.stream()
        if attack.name_the_highest(stream):
            attack.turn()
        stream.sender.reset(1)
        attack.turn()
        assert attack.kept <= MIB
    assert attack.kept == 0


def test_what_is_left_unread_closes_the_stream_window_and_reading_opens_it(attack: Attack) -> None:
    stream = attack.stream()
    assert stream.stream_id is not None
    left = attack.left[stream.stream_id] = Left()
    assert attack.send(stream, 4 * MIB) == left.unread == MIB
    left.unread = 0
    attack.turn()
    assert stream.max_stream_data_remote > MIB
    assert attack.send(stream, MIB) >= MIB


def test_unread_streams_together_close_the_connection_window(attack: Attack) -> None:
    blocked = False
    while not blocked:
        stream = attack.stream()
        assert stream.stream_id is not None
        attack.left[stream.stream_id] = Left()
        blocked = attack.send(stream, MIB // 2) < MIB // 2
    assert sum(left.unread for left in attack.left.values()) == internals.CONNECTION_WINDOW
    attack.left.clear()  # read, or finished and forgotten
    assert attack.send(attack.stream(), MIB) >= MIB


def test_a_stream_in_too_many_pieces_ends_the_connection(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "MAX_PIECES", 64)
    sender = attack.stream().sender
    sender.write(bytes(1000))
    sender._pending = RangeSet([range(offset, offset + 1) for offset in range(1, 999, 2)])
    for _ in range(400):
        attack.turn()
    assert max(len(stream.receiver._ranges) for stream in attack.victim._streams.values()) < 200
    ends = [event for event in attack.events if isinstance(event, ConnectionTerminated)]
    assert [end.reason_phrase for end in ends] == ["a stream in too many pieces"]


def test_a_handshake_out_of_order_is_kept_to_a_point(tmp_path: Path) -> None:
    client, _ = pair(tmp_path)
    client._handshake_complete = False
    internals.bound_receiving(client, {})
    receiver = client._crypto_streams[tls.Epoch.HANDSHAKE].receiver
    receiver.handle_frame(QuicStreamFrame(data=b"x", offset=2 * internals.MAX_CRYPTO))
    client.datagrams_to_send(now=1.0)
    assert client._close_event is not None
    assert client._close_event.error_code == QuicErrorCode.CRYPTO_BUFFER_EXCEEDED


def test_a_handshake_that_stands_still_is_given_up_early(tmp_path: Path) -> None:
    client, server = pair(tmp_path)
    for quic in (client, server):
        internals.bound_receiving(quic, {})
    assert server._idle_timeout() == client._idle_timeout() == 60.0
    client._handshake_complete = server._handshake_complete = False
    assert server._idle_timeout() == internals.HANDSHAKE_TIME
    assert client._idle_timeout() == 60.0  # connect() has a timeout of its own


def test_limits_that_get_lost_are_sent_again(attack: Attack) -> None:
    assert attack.send(attack.stream(), 8 * MIB, lost=20) == 8 * MIB


def test_quic_connections_can_be_bounded() -> None:
    """Its class is exchanged, so it must have a __dict__ and no __slots__ of its own."""
    assert "__slots__" not in vars(QuicConnection)
