"""One connection as the server sees it: its first stream is the control stream, if it says hello."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final, Protocol

import msgspec
import structlog
from aioquic.quic.connection import QuicConnection

from quicferry.protocol import wire
from quicferry.protocol.control import MAX_LINE_BYTES, Ack, FromClient, Hello, LineDecoder, Moved, Ready
from quicferry.protocol.errors import FerryError
from quicferry.quic.adapter import Stream, StreamConnection

log = structlog.get_logger(__name__)

CONTROL_STREAM: Final = 0
HELLO_WAIT: Final = 1.0
"""Seconds in which a first stream that begins like a hello has to complete the line."""
HELLO_GRACE: Final = 0.2
"""Seconds after the handshake in which a move waits for a hello: a client of ours says it at once."""
MAX_IDLE_LINES: Final = 64
"""Control lines without an effect that a client may send before its control stream is closed."""


class Host(Protocol):
    """What a connection needs of its server."""

    def connection_established(self, connection: ServedConnection) -> None: ...
    def connection_ended(self, connection: ServedConnection) -> None: ...
    def said_hello(self, connection: ServedConnection, hello: Hello) -> str:
        """The client's name, unique among those connected."""

    def control_lost(self, connection: ServedConnection) -> None:
        """The control stream is gone, the connection is not."""

    def stream_opened(self, connection: ServedConnection, stream: Stream) -> None: ...
    def acked(self, connection: ServedConnection, message: Ack) -> bool:
        """Whether it meant anything; the same for the next two."""

    def ready(self, connection: ServedConnection, message: Ready) -> bool: ...
    def moved(self, connection: ServedConnection, message: Moved) -> bool: ...


class ServedConnection(StreamConnection):
    """Tells control lines from application data and hands each to where it belongs."""

    def __init__(self, quic: QuicConnection, host: Host) -> None:
        super().__init__(quic)
        self.name = ""
        """The client's name once it said hello."""
        self.quiesces = False
        self.leaving = False
        """A close was sent; the connection is only waiting for its end."""
        self._since = 0.0
        self._host = host
        self._first = bytearray()
        self._sniffing: asyncio.TimerHandle | None = None
        self._decided = False
        self._decoder: LineDecoder[FromClient] | None = None
        self._control: Stream | None = None
        self._idle_lines = 0

    @property
    def has_control(self) -> bool:
        """Whether the client can be told of a move and can answer."""
        return self._control is not None

    @property
    def hello_due(self) -> float:
        """Seconds for which a connection that has just been made may still say hello; 0 if it did, or won't."""
        if self._decided or self.over or self.leaving:
            return 0.0
        return max(0.0, self._since + HELLO_GRACE - time.monotonic())

    def tell(self, line: bytes) -> bool:
        """Send one control line at once; False if there is no control stream."""
        if self._control is None or self.over:
            return False
        try:
            self._control.write(line)
        except ConnectionResetError:
            self._lose_control()
            return False
        self.transmit_now()
        return True

    def say_goodbye(self, reason: str) -> None:
        self.leaving = True
        super().say_goodbye(reason)

    def handshake_completed(self) -> None:
        self._since = time.monotonic()
        self._host.connection_established(self)

    def connection_over(self, reason: str) -> None:
        self._control = None
        self._stop_sniffing()
        self._host.connection_ended(self)

    def stream_opened(self, stream: Stream) -> None:
        self._host.stream_opened(self, stream)

    def stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id != CONTROL_STREAM or (self._decided and self._decoder is None):
            super().stream_data(stream_id, data, end)
        elif self._decoder is not None:
            self._take_lines(data, end)
        else:
            self._sniff(data, end)

    # The first stream, until it is clear what it is.

    def _sniff(self, data: bytes, end: bool) -> None:
        self._first += data
        if not self._first and not end:
            return
        line, newline, _ = bytes(self._first).partition(b"\n")
        if self._first[:1] == b"{" and newline and len(line) <= MAX_LINE_BYTES:
            self._judge(line, end)
        elif self._first[:1] == b"{" and not end and len(self._first) <= MAX_LINE_BYTES:
            if self._sniffing is None:
                self._sniffing = asyncio.get_running_loop().call_later(HELLO_WAIT, self._replay, False)
        else:
            self._replay(end)

    def _judge(self, line: bytes, end: bool) -> None:
        try:
            hello: Hello = wire.decode(line, Hello)
        except FerryError as error:
            if not _calls_itself_hello(line):
                self._replay(end)
                return
            self._decide()
            self._decoder = LineDecoder(FromClient)
            self._control = self.add_stream(CONTROL_STREAM)
            self._break_control(error)
            return
        rest = bytes(self._first[len(line) + 1 :])
        self._decide()
        self._decoder = LineDecoder(FromClient)
        self._control = self.add_stream(CONTROL_STREAM)
        self.quiesces = hello.quiesce
        self.name = self._host.said_hello(self, hello)
        if rest or end:
            self._take_lines(rest, end)

    def _replay(self, end: bool) -> None:
        """It is an application's stream: hand it on as it came."""
        if not self._decided:
            first = bytes(self._first)
            self._decide()
            super().stream_data(CONTROL_STREAM, first, end)
            self.transmit_now()

    def _decide(self) -> None:
        self._decided = True
        self._first.clear()
        self._stop_sniffing()

    def _stop_sniffing(self) -> None:
        if self._sniffing is not None:
            self._sniffing.cancel()
            self._sniffing = None

    # The control stream.

    def _take_lines(self, data: bytes, end: bool) -> None:
        if self._control is None or self._decoder is None:
            return
        try:
            for message in self._decoder.feed(data):
                self._take(message)
                if self._control is None:
                    return
        except FerryError as error:
            self._break_control(error)
            return
        if end:
            log.info("control_stream_ended", client=self.name)
            self._control.feed(b"", True)
            self._control.close()
            self._lose_control()

    def _take(self, message: FromClient) -> None:
        if isinstance(message, Ack):
            meant = self._host.acked(self, message)
        elif isinstance(message, Ready):
            meant = self._host.ready(self, message)
        elif isinstance(message, Moved):
            meant = self._host.moved(self, message)
        else:
            meant = False
        if not meant:
            self._idle_lines += 1
            if self._idle_lines > MAX_IDLE_LINES:
                raise FerryError("bad_request", f"More than {MAX_IDLE_LINES} control lines that mean nothing.")

    def _break_control(self, error: FerryError) -> None:
        log.error("control_stream_broken", client=self.name or "?", code=error.code, reason=str(error))
        if self._control is not None:
            self._control.abort()
            self._lose_control()

    def _lose_control(self) -> None:
        self._control = None
        self._host.control_lost(self)


def _calls_itself_hello(line: bytes) -> bool:
    try:
        found: Any = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("type") == "hello"
