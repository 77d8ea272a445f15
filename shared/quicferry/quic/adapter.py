"""A QUIC connection's streams as asyncio readers and writers, on top of aioquic's protocol class.

It adds what aioquic's own adapter leaves out: ``drain`` waits, a reset or a lost connection reaches the
reader, a finished stream is forgotten, and what the application does not read closes the peer's window. A
stream that is to be read no more is aborted: left alone it keeps its share of the connection's window.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic import events
from aioquic.quic.connection import QuicConnection

from quicferry.quic import internals

HIGH_WATER: Final = 512 * 1024
"""Bytes written and not acknowledged at which ``drain`` begins to wait."""
LOW_WATER: Final = 128 * 1024
REMEMBERED: Final = 256
"""Streams given up whose late data is known to be nobody's."""
CANCELLED: Final = 1
"""Application error code of a stream given up (RFC 9000, 20.2)."""


class Stream(asyncio.Transport):
    """One stream: the transport under its writer, and the feeder of its reader."""

    def __init__(self, connection: StreamConnection, stream_id: int, *, readable: bool, writable: bool) -> None:
        super().__init__()
        loop = asyncio.get_running_loop()
        self.id = stream_id
        self.reader = asyncio.StreamReader(loop=loop)
        self.sink: Callable[[bytes], None] | None = None
        """Takes the data, in the very moment that it comes, instead of the reader, which learns of the end only."""
        self.unread = 0
        """Bytes that came since the reader was full, which is at 128 KiB."""
        self._protocol = asyncio.StreamReaderProtocol(self.reader, loop=loop)
        self.writer = asyncio.StreamWriter(self, self._protocol, self.reader, loop)
        self._connection = connection
        self._received_all = not readable
        self._sent_all = not writable
        self._lost = False
        self._full = False
        self._held_back = False
        self.reader.set_transport(self)

    # What comes in.

    def feed(self, data: bytes, end: bool) -> None:
        if self._received_all:
            return
        if data:
            (self.sink or self.reader.feed_data)(data)
            if self._full:
                self.unread += len(data)
        if end:
            self._received_all = True
            self.reader.feed_eof()
            self._maybe_done()

    def reset(self, error: Exception) -> None:
        """The peer gave up sending."""
        if not self._received_all:
            self._received_all = True
            self._drop_unread(error)
            self._maybe_done()

    def stopped(self) -> None:
        """The peer reads no more: what is still written is thrown away, as by a closed pipe."""
        self._sent_all = True
        self._maybe_done()

    def connection_lost(self) -> None:
        if not self._lost:
            self._lost = True
            self._received_all = self._sent_all = True
            self._protocol.connection_lost(None)

    def acknowledged(self) -> bool:
        """Whether so much of what was written is acknowledged that more may be written."""
        if not self._sent_all and self._connection.unsent(self.id) > LOW_WATER:
            return False
        self._held_back = False
        self._protocol.resume_writing()
        return True

    # asyncio.Transport, as StreamWriter and StreamReader use it.

    def write(self, data: Any) -> None:
        """Raises ConnectionResetError once the stream or its connection is gone."""
        if self._sent_all:
            raise ConnectionResetError(f"stream {self.id} takes no more data")
        self._connection.send(self.id, bytes(data), end=False)
        if not self._held_back and self._connection.unsent(self.id) > HIGH_WATER:
            self._held_back = True
            self._connection.hold_back(self)
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return not self._sent_all

    def write_eof(self) -> None:
        if not self._sent_all:
            self._sent_all = True
            self._connection.send(self.id, b"", end=True)
            self._maybe_done()

    def close(self) -> None:
        self.write_eof()

    def is_closing(self) -> bool:
        return self._sent_all

    def abort(self) -> None:
        """Give the stream up both ways (RESET_STREAM and STOP_SENDING)."""
        self._connection.give_up(self.id, send=not self._sent_all, receive=not self._received_all)
        if not self._received_all:
            self._drop_unread(ConnectionResetError(f"stream {self.id} was given up"))
        self._received_all = self._sent_all = True
        self._maybe_done()

    def release(self) -> None:
        """Whoever served the stream has left: it ends, and what was not read, or comes now, is thrown away."""
        self.sink = _nowhere
        self._drop_unread(ConnectionResetError(f"the handler of stream {self.id} has returned"))
        self.close()

    def pause_reading(self) -> None:
        """The reader is full; it goes on taking what the window still allows."""
        self._full = True

    def resume_reading(self) -> None:
        """The reader has room again, or is asked for more than it has room for."""
        self._full, self.unread = False, 0
        self._connection.read_on()
        if self._lost:
            self._connection.forget(self.id)

    def is_reading(self) -> bool:
        return not self._full

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "stream_id":
            return self.id
        return default

    def _drop_unread(self, error: Exception) -> None:
        self.reader.set_exception(error)  # from now on the reader gives nothing else
        internals.empty(self.reader)
        self.resume_reading()

    def _maybe_done(self) -> None:
        if self._received_all and self._sent_all and not self._lost:
            self._lost = True
            # A peer's counts until its handler has read it or left; of ours nobody says when it is read no more.
            if not self.unread or self._connection.is_own(self.id):
                self._connection.forget(self.id)
            self._protocol.connection_lost(None)


def _nowhere(_data: bytes) -> None: ...


class StreamConnection(QuicConnectionProtocol):
    """A connection with :class:`Stream` objects; subclasses say what to do with a peer's streams."""

    def __init__(self, quic: QuicConnection, stream_handler: object = None) -> None:
        super().__init__(quic)
        self._streams: dict[int, Stream] = {}
        internals.bound_receiving(quic, self._streams)
        self._held_back: list[Stream] = []
        self._given_up: deque[int] = deque(maxlen=REMEMBERED)
        self.established = False
        self.over = False

    def new_stream(self) -> Stream:
        """A new bidirectional stream of ours. Raises ConnectionResetError once the connection is over."""
        if self.over:
            raise ConnectionResetError("the connection is over")
        return self.add_stream(internals.reserve_stream(self._quic))

    def stream_opened(self, stream: Stream) -> None:
        """The peer opened a stream."""

    def handshake_completed(self) -> None:
        """Once a connection."""

    def connection_over(self, reason: str) -> None:
        """Once a connection, also when the handshake failed."""

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        """Data of any stream; opens a peer's stream at its first."""
        stream = self._streams.get(stream_id)
        if stream is None:
            if self.is_own(stream_id):
                return  # ours, finished and forgotten
            if stream_id in self._given_up:
                return
            stream = self.add_stream(stream_id)
            self.stream_opened(stream)
        stream.feed(data, end)

    def transmit_now(self) -> None:
        """Send what is due without waiting for the event loop's next turn."""
        if self._transport is not None:
            self.transmit()

    def probe(self) -> None:
        """Send something that the peer must acknowledge, which ends any waiting for a retransmission timer."""
        if not self.over:
            internals.send_probe(self._quic)
            self.transmit_now()

    def say_goodbye(self, reason: str) -> None:
        """Close cleanly: application close, code 0 (RFC 9000, 10.2)."""
        if not self.over:
            self.close(reason_phrase=reason)

    def finish(self, reason: str) -> None:
        """Close and be over at once. aioquic answers nothing while closing, so there is nothing to wait for."""
        if not self.over:
            self.say_goodbye(reason)
            internals.stop_timer(self)
            self._be_over(reason)
            self._closed.set()

    # For the streams.

    def send(self, stream_id: int, data: bytes, *, end: bool) -> None:
        try:
            self._quic.send_stream_data(stream_id, data, end_stream=end)
        except (ValueError, RuntimeError) as error:
            raise ConnectionResetError(str(error)) from None
        self._transmit_soon()

    def hold_back(self, stream: Stream) -> None:
        self._held_back.append(stream)

    def unsent(self, stream_id: int) -> int:
        return internals.unsent(self._quic, stream_id)

    def give_up(self, stream_id: int, *, send: bool, receive: bool) -> None:
        if send:
            self._quic.reset_stream(stream_id, CANCELLED)
        if receive:
            self._given_up.append(stream_id)
            self._quic.stop_stream(stream_id, CANCELLED)
        self._transmit_soon()

    def read_on(self) -> None:
        """The application has read, so the peer may send more."""
        if not self.over:
            self._transmit_soon()

    def forget(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)

    # aioquic's side.

    def quic_event_received(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived):
            self.stream_data(event.stream_id, event.data, event.end_stream)
        elif isinstance(event, events.StreamReset):
            if (stream := self._streams.get(event.stream_id)) is not None:
                stream.reset(ConnectionResetError(f"stream {event.stream_id} was reset, code {event.error_code}"))
        elif isinstance(event, events.StopSendingReceived):
            if (stream := self._streams.get(event.stream_id)) is not None:
                stream.stopped()
        elif isinstance(event, events.HandshakeCompleted):
            self.established = True
            self.handshake_completed()
        elif isinstance(event, events.ConnectionTerminated):
            self._be_over(event.reason_phrase)

    def transmit(self) -> None:
        super().transmit()
        if self._held_back:
            self._held_back = [stream for stream in self._held_back if not stream.acknowledged()]

    def _be_over(self, reason: str) -> None:
        if self.over:
            return
        self.over = True
        for stream in list(self._streams.values()):
            stream.connection_lost()
        self._streams.clear()
        self._held_back.clear()
        self.connection_over(reason)

    def is_own(self, stream_id: int) -> bool:
        """Whether it was opened from here (RFC 9000, 2.1)."""
        return stream_id % 2 == (0 if self._quic.configuration.is_client else 1)

    def add_stream(self, stream_id: int) -> Stream:
        ours = self.is_own(stream_id)
        one_way = bool(stream_id & 2)
        stream = Stream(self, stream_id, readable=not one_way or not ours, writable=not one_way or ours)
        self._streams[stream_id] = stream
        return stream
