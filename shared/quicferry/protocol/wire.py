"""JSON on the wire, msgspec structs in code: one place that encodes and decodes."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Final

import msgspec

from quicferry.protocol.errors import FerryError

SCHEMA_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 256 * 1024
"""NATS messages larger than this are refused unread."""

NAME_PATTERN: Final = r"^[A-Za-z0-9_-]{1,64}$(?!\n)"
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
"""A service, node, berth, client or migration id: one NATS subject token.

The lookahead is for Python, where ``$`` also matches before a final newline.
"""
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=3_600_000)]
"""A duration on the wire, in milliseconds."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""A number of things, an epoch, a time: no larger than what every JSON reader keeps exact (RFC 7493, 2.2).

Python's own integers have no end, and one of 400 digits fails where it first meets a float.
"""
LONGEST_REASON: Final = 200
"""Characters of a decoder's complaint, which quotes what it complains of."""

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def encode(message: msgspec.Struct) -> bytes:
    """JSON, UTF-8, no newline."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: Any) -> Any:
    """Decode ``data`` as ``kind`` (a struct or a tagged union); unknown fields are ignored.

    Raises FerryError ``bad_request`` with the path of the offending field.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise FerryError("bad_request", f"The message has {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}.")
    try:
        return _decoder(kind).decode(data)
    except msgspec.ValidationError as error:
        match = _PATH.match(str(error))
        what, path = (match["what"], match["path"]) if match else (str(error), "")
        raise FerryError("bad_request", f"{_shortened(what)}.", path=path or "$") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FerryError("bad_request", f"Not valid JSON: {error}.") from None


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"
