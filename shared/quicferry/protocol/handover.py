"""The parked socket's hand-over between a server wrapper and its berth's agent.

Both talk over an abstract AF_UNIX stream socket in the berth's network namespace (unix(7)). One exchange a
connection, one JSON line each way:

- ``park``: the wrapper sends the line with its UDP socket attached (SCM_RIGHTS), closes its own UDP
  socket and then the connection, and stands still until SIGUSR2. End of file tells the agent that
  the process holds no socket: from here it cannot send. Any byte before it calls the hand-over off.
- ``adopt``: the wrapper asks, the agent answers ``adopted`` with the parked UDP socket attached,
  queue and all. A wrapper that stands still says for which migration; to another's, the line comes alone.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from quicferry.protocol.api import Address
from quicferry.protocol.wire import Count, Name

MAX_LINE_BYTES: Final = 4096
TIMEOUT: Final = 2.0
"""Seconds either side waits for the other."""

CALLED_OFF: Final = b"\n"
SO_TIMESTAMPNS: Final = 35
"""Set by the agent on the socket that waits at the target, read by the wrapper: when each datagram came (socket(7)).
The number is SO_TIMESTAMPNS_OLD of asm-generic/socket.h; Python has no name for it."""


def socket_name(port: int) -> str:
    """The abstract socket's name for the service on UDP ``port``."""
    return f"\0quicferry.parking.{port}"


class Park(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="op", tag="park"):
    id: Name | None = None
    """The migration that the process parks for; None for whichever the agent has."""


class Adopt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="op", tag="adopt"):
    id: Name | None = None
    """The migration that the process stands still for; None while it serves."""


class Adopted(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="adopted"):
    """What the adopting process needs to know of the time it did not see."""

    id: Name
    outcome: Literal["moved", "rolled_back"]
    node: Name
    berth: Name
    address: Address
    epoch: Count


Request = Park | Adopt
