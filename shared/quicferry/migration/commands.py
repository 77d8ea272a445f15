"""What the state machine asks of its coordinator."""

from __future__ import annotations

from typing import Literal

import msgspec

from quicferry.protocol.errors import ErrorBody


class CallAgent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="command", tag="call"):
    """Send one step to the source's checkpoint agent or the target's restore agent.

    What came of it arrives as that agent's event; a call that nobody took, as ``coordinator.call_failed``.
    """

    agent: Literal["checkpoint", "restore"]
    verb: str
    attempt: int = 1
    round: int = 0

    @property
    def name(self) -> str:
        return f"{self.agent}.{self.verb}"


class ArmServer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="command", tag="arm"):
    """Tell the server wrapper where it will go, or, with ``disarm``, that it stays.

    Answered by ``coordinator.armed`` or ``coordinator.disarmed``; refused or unheard, by ``coordinator.call_failed``
    to ``server.arm`` or ``server.disarm``.
    """

    disarm: bool = False

    @property
    def name(self) -> str:
        return "server.disarm" if self.disarm else "server.arm"


class Decide(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="command", tag="decide"):
    """Write a decision into the log, unless another coordinator was first."""

    decision: Literal["prepared", "committed", "rolled_back", "completed", "failed"]
    reason: ErrorBody | None = None
    arrived: int = 0


class StartTimer(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="command", tag="start_timer"
):
    """Write ``coordinator.timeout`` after ``seconds``; replaces the timer that runs, if any."""

    phase: str
    seconds: float
    attempt: int = 1


class StopTimer(msgspec.Struct, frozen=True, kw_only=True, tag_field="command", tag="stop_timer"):
    """No timer any more."""


class Place(msgspec.Struct, frozen=True, kw_only=True, tag_field="command", tag="place"):
    """Put the target into the placement bucket, with the new epoch."""


class Unlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="command", tag="unlock"):
    """Give the service's lock back."""


Command = CallAgent | ArmServer | Decide | StartTimer | StopTimer | Place | Unlock
