"""What the soak and its client processes say to each other, one JSON object a line."""

from __future__ import annotations

import msgspec


class Open(msgspec.Struct, tag="open", frozen=True, kw_only=True):
    """Dial a session, and ping for as long as it lives."""

    session: str
    service: str
    host: str
    port: int


class Leave(msgspec.Struct, tag="leave", frozen=True, kw_only=True):
    """Close a service's sessions; answered with their accounts."""

    service: str


class Still(msgspec.Struct, tag="still", frozen=True, kw_only=True):
    """Send nothing more; answered with every session's account once all echoes have come, or in vain."""


class Go(msgspec.Struct, tag="go", frozen=True, kw_only=True):
    """Send again."""


Order = Open | Leave | Still | Go


class Connected(msgspec.Struct, tag="connected", frozen=True, kw_only=True):
    session: str


class NotConnected(msgspec.Struct, tag="not_connected", frozen=True, kw_only=True):
    session: str
    why: str


class Gap(msgspec.Struct, tag="gap", frozen=True, kw_only=True):
    """What one move cost one session."""

    session: str
    migration: str
    outcome: str
    ms: float
    """From the last echo before to the first one after; after a rollback the longest pause in the move."""


class Ended(msgspec.Struct, tag="ended", frozen=True, kw_only=True):
    """A session ended that nobody told to."""

    session: str
    service: str
    why: str


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """One session, summed up."""

    session: str
    service: str
    sent: int
    echoed: int
    handshakes: int
    peer: str
    """Where the client sends to."""
    moves: int
    """Moves it has measured."""


class Accounts(msgspec.Struct, tag="accounts", frozen=True, kw_only=True):
    sessions: list[Account]
    kept: int
    """Changes of congestion windows that the sessions' traces keep, by design up to a bound."""


Said = Connected | NotConnected | Gap | Ended | Accounts
