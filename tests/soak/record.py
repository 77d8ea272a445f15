"""What a soak has seen, as data."""

from __future__ import annotations

import msgspec

from tests.soak.leaks import Reading, Trend


class Move(msgspec.Struct, kw_only=True):
    """One migration that was asked for."""

    id: str
    service: str
    began: float
    """Seconds since the soak began, as all times here."""
    ended: float = 0.0
    outcome: str = ""
    """``completed``, ``rolled_back``, ``failed``, ``refused``; empty while it is under way."""
    code: str = ""
    """The reason's, unless it completed."""
    cancelled: bool = False
    """Whether a cancel was sent, in time or not."""
    faults: list[str] = []
    """Kinds of the faults that were at work meanwhile."""
    gaps_ms: list[float] = []
    """One a session that measured it."""


class Fault(msgspec.Struct, kw_only=True):
    """One fault that struck."""

    kind: str
    detail: str
    began: float
    ended: float = 0.0
    """When what it did was over; 0 while it is not."""


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """Something that must hold and did not."""

    at: float
    what: str
    service: str = ""
    migration: str = ""
    evidence: str = ""
    """The file with the logs."""


class Life(msgspec.Struct, kw_only=True):
    """One process from its start to its end, or one server through all its copies."""

    process: str
    number: int
    """The PID that it began with."""
    calm: list[Reading] = []
    """Readings of calm moments: these are judged."""
    most: Reading | None = None
    """The highest of each figure, at any moment."""
    descriptors_first: dict[str, int] = {}
    """What they were in the first calm, with how many of each."""
    descriptors_last: dict[str, int] = {}


class Result(msgspec.Struct, kw_only=True):
    """A whole soak."""

    seed: int
    seconds: float
    services: int
    clients: int
    sessions: int = 0
    sessions_ended_with_their_server: int = 0
    handshakes: int = 0
    echoes_sent: int = 0
    echoes_lost: int = 0
    echoes_unanswered: int = 0
    """By servers that were killed."""
    bad_requests: int = 0
    calms: int = 0
    restarts: dict[str, int] = {}
    """Of the processes that are started again when they end."""
    images_max: int = 0
    """Bytes."""
    processes_calm: int = 0
    """In all berths, in the last calm: in each its init, and the servers."""
    processes_max: int = 0
    """At any moment that was looked at."""
    moves: list[Move] = []
    faults: list[Fault] = []
    violations: list[Violation] = []
    lives: list[Life] = []
    trends: list[Trend] = []

    def attribute(self) -> None:
        """Tell each move what was at work while it was under way."""
        for move in self.moves:
            at_work = [fault for fault in self.faults if _overlap(move, fault)]
            move.faults = list(dict.fromkeys(fault.kind for fault in at_work))

    @property
    def leaks(self) -> list[Trend]:
        return [trend for trend in self.trends if trend.leak]

    @property
    def clean(self) -> bool:
        return not self.violations and not self.leaks


def _overlap(move: Move, fault: Fault) -> bool:
    return fault.began <= (move.ended or fault.began) and move.began <= (fault.ended or move.began)
