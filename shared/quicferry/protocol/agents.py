"""What the coordinator asks of the agents and of the server wrapper.

Every request is safe to repeat: an agent that has done a step already reports it again. An agent answers
:class:`Accepted` at once; what came of it is an event in the log.
"""

from __future__ import annotations

from typing import Final

import msgspec

from quicferry.protocol.api import Address, Options, Place
from quicferry.protocol.wire import Count, Name


class AgentRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of one migration; ``verb`` is the last token of the subject."""

    id: Name
    service: Name
    epoch: Count
    source: Place
    target: Place
    options: Options = Options()
    round: Count = 0
    """The pre-copy round, from 1; 0 where none is meant."""
    attempt: Count = 1


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    id: str


class ArmRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tells a server wrapper what its next SIGTERM means.

    With ``target``: move there. Without: forget an earlier arming; a move that has not yet given up
    the socket is called off, and the clients that heard of it are told.
    """

    id: Name
    epoch: Count
    target: Address | None = None
    options: Options = Options()


ARE_YOU_THERE: Final = ArmRequest(id="are-you-there", epoch=0)
"""Calls off a move that nobody armed, which changes nothing: whether the wrapper answers is what is asked."""


class ArmReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    clients: Count
    """Connected clients that said hello."""
