"""The control stream's codec: newline-delimited JSON, bounded, sans-IO.

The first bidirectional stream of a connection carries it. docs/protocol.md describes each message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Generic, Literal, TypeVar

import msgspec

from quicferry.protocol import wire
from quicferry.protocol.api import Address
from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import Count, Millis, Name

MAX_LINE_BYTES: Final = 4096
"""A longer line is an error that closes the stream."""
OUTDATED: Final = "outdated"
"""How a refusal begins that is about the epoch, not about the address."""
MAX_REFUSAL: Final = 200
"""Characters of a refusal that are sent, or read."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="hello"):
    """Client to server, first line: who the client is and what it can do."""

    client: Name
    v: Count = wire.SCHEMA_VERSION
    quiesce: bool = False
    """The client's application wants to be told before the freeze and will send ``ready``."""


class _Told(Address, frozen=True, kw_only=True):
    """Where a server sends its client, whatever that is: the client's policy judges it, and a refusal is an ack."""

    def __post_init__(self) -> None:
        pass


class Migrate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="migrate"):
    """Server to client: the server is about to move to ``addr``:``port``."""

    id: Name
    addr: Annotated[str, msgspec.Meta(min_length=2, max_length=45)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    epoch: Count = 0
    quiesce_ms: Millis = 0
    """How long a client that asked to be told may take to say ``ready``."""

    @property
    def address(self) -> Address:
        return _Told(host=self.addr, port=self.port)


class Ack(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="ack"):
    """Client to server: seen, and both peers are sent to. Not: recovered."""

    id: Name
    refused: str = ""
    """Why the client stays with the old peer, if its policy says so; empty when it swapped."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="ready"):
    """Client to server: the application is quiet; it is safe to dump."""

    id: Name


class Rollback(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="rollback"):
    """Server to client: the move was called off; the old peer stays."""

    id: Name


class Moved(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="moved"):
    """Client to server: the target has spoken and is the only peer now."""

    id: Name
    source: Literal["wrapper", "application"]
    interruption_ms: Annotated[float, msgspec.Meta(ge=0, le=3_600_000)]


FromClient = Hello | Ack | Ready | Moved
FromServer = Migrate | Rollback


M = TypeVar("M")


def encode(message: FromClient | FromServer) -> bytes:
    """One line, newline included."""
    return wire.encode(message) + b"\n"


class LineDecoder(Generic[M]):
    """Turns received bytes into messages of the tagged union ``kind``.

    Holds at most one incomplete line. After an error it takes no more: the stream is to be closed.
    """

    def __init__(self, kind: object) -> None:
        self._kind = kind
        self._buffer = bytearray()
        self._broken = False

    def feed(self, data: bytes) -> Iterator[M]:
        """Yield each complete message; raises FerryError ``bad_request`` at the first bad line."""
        if self._broken:
            return
        self._buffer += data
        while (end := self._buffer.find(b"\n", 0, MAX_LINE_BYTES + 1)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if line.strip():
                yield self._parse(line)
        if len(self._buffer) > MAX_LINE_BYTES:
            self._broken = True
            self._buffer.clear()
            raise FerryError("bad_request", f"A control line is longer than {MAX_LINE_BYTES} bytes.")

    def _parse(self, line: bytes) -> M:
        try:
            message: M = wire.decode(line, self._kind)
            return message
        except FerryError:
            self._broken = True
            self._buffer.clear()
            raise
