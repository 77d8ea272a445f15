"""What NATS or the other side refuses, as errors of ours; and how a refusal ends the wait it belongs to."""

from __future__ import annotations

import asyncio
from typing import Final

import nats.js.errors
from nats.micro.request import ERROR_CODE_HEADER, ERROR_HEADER

from quicferry.protocol import wire
from quicferry.protocol.api import ErrorReply
from quicferry.protocol.errors import FerryError

WRONG_LAST_SEQUENCE: Final = (10071, 10164)
"""JetStream's error codes for a write that expected another last entry."""


class Watch:
    """Lets a refusal or a lost connection, which nats-py reports elsewhere, end the wait it belongs to."""

    __slots__ = ("denied", "lost", "scope")

    def __init__(self) -> None:
        self.denied = ""
        self.lost = False
        self.scope: asyncio.Timeout

    def end(self, *, denied: str = "", lost: bool = False) -> None:
        self.denied, self.lost = denied or self.denied, lost
        if not self.scope.expired():
            self.scope.reschedule(asyncio.get_running_loop().time())


def denied(denied: str, what: str) -> FerryError:
    return FerryError(
        "nats_denied",
        f"NATS refused {denied}: {what} is not permitted.",
        hint="The permissions of the NATS user in the server's configuration decide.",
    )


def refused(error: nats.js.errors.APIError, what: str = "") -> FerryError:
    """What JetStream itself says no to: a full account, a sealed stream, a disk that fails."""
    about = f" {what}" if what else ""
    return FerryError(
        "nats_unreachable",
        f"JetStream refused{about}: {error.description}.",
        hint="'nats stream ls' and 'nats account info' show the limits; the NATS server's log may tell more.",
    )


def error_of(body: bytes, headers: dict[str, str]) -> FerryError:
    try:
        answer: ErrorReply = wire.decode(body, ErrorReply)
    except FerryError:  # a responder that is not ours: the headers are all there is
        return FerryError("internal", f"Refused: {headers.get(ERROR_HEADER, '')} ({headers[ERROR_CODE_HEADER]}).")
    return FerryError.of(answer.error)


def no_nkeys() -> FerryError:
    return FerryError(
        "bad_settings",
        "NATS credentials and nkeys need the package 'nkeys', which is not installed.",
        hint="pip install 'nats-py[nkeys]'",
    )


def unusable(origin: str, error: Exception) -> FerryError:
    return FerryError(
        "bad_settings",
        f"The credentials of {origin} can't be used: {error}.",
        hint="Check the file: that of NATS_CREDS (a context's creds) has a JWT and a seed, that of NATS_NKEY a seed.",
    )
