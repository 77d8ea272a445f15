"""The event log's entries: what was decided, and what was seen.

An event's ``kind`` is ``<source>.<event>`` and gives its subject. Every event has an identity
(:func:`message_id`), so publishing it again is safe.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from quicferry.protocol import subjects
from quicferry.protocol.api import Options, Place
from quicferry.protocol.errors import ErrorBody
from quicferry.protocol.wire import SCHEMA_VERSION, Count, Name


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind"):
    """Common to all: the migration's ``id`` and when it was written, Unix time in milliseconds."""

    id: Name
    at_ms: Count
    v: Count = SCHEMA_VERSION

    identity: ClassVar[tuple[str, ...]] = ()
    """Fields that tell two events of one kind in one migration apart."""


# Decisions: written by a coordinator only, each once.


class Requested(Event, tag="decision.requested", frozen=True, kw_only=True):
    service: Name
    source: Place
    target: Place
    epoch: Count
    """The epoch the service has after the move."""
    options: Options = Options()


class Prepared(Event, tag="decision.prepared", frozen=True, kw_only=True):
    pass


class Committed(Event, tag="decision.committed", frozen=True, kw_only=True):
    pass


class RolledBack(Event, tag="decision.rolled_back", frozen=True, kw_only=True):
    reason: ErrorBody


class Completed(Event, tag="decision.completed", frozen=True, kw_only=True):
    arrived: Count = 0
    """Clients that the target has heard from."""


class Failed(Event, tag="decision.failed", frozen=True, kw_only=True):
    """Refused before anything was touched, or past the commit and beyond repair."""

    reason: ErrorBody


Decision = Requested | Prepared | Committed | RolledBack | Completed | Failed


# What the coordinator saw.


class CancelAsked(Event, tag="coordinator.cancel", frozen=True, kw_only=True):
    pass


class TimedOut(Event, tag="coordinator.timeout", frozen=True, kw_only=True):
    identity = ("phase", "attempt")
    phase: str
    attempt: Count = 1


class CallFailed(Event, tag="coordinator.call_failed", frozen=True, kw_only=True):
    """A request to an agent or a wrapper was refused, or nobody answered."""

    identity = ("to", "attempt")
    to: str
    """``checkpoint.prepare``, ``server.arm`` and so on."""
    attempt: Count
    error: ErrorBody


class Armed(Event, tag="coordinator.armed", frozen=True, kw_only=True):
    """The server wrapper answered that it is armed."""

    clients: Count


class Disarmed(Event, tag="coordinator.disarmed", frozen=True, kw_only=True):
    """The server wrapper called the move off before it gave up its socket."""


# What the checkpoint agent saw.


class SourceReady(Event, tag="checkpoint.prepared", frozen=True, kw_only=True):
    image: str
    """The berth's image id, to compare with the target's."""
    rss_bytes: Count
    shared_bytes: Count = 0
    """How much of it is a shared heap, which is mapped again instead of copied."""


class PreDumped(Event, tag="checkpoint.pre_dumped", frozen=True, kw_only=True):
    identity = ("round",)
    round: Count
    pages: Count
    took_ms: float


class SourceHeld(Event, tag="checkpoint.held", frozen=True, kw_only=True):
    """The server gave up its socket and stands still: the client's pause begins."""

    waited_ms: float
    """From SIGTERM."""


class Dumped(Event, tag="checkpoint.dumped", frozen=True, kw_only=True):
    """The images are complete; the source is frozen, without a socket."""

    pages: Count
    image_bytes: Count
    took_ms: float
    """From the request to CRIU to its post-dump notification."""
    pipes: dict[str, str] = {}
    """File descriptor number to ``pipe:[inode]``, for the standard streams that lead out of the berth."""


class SourceGone(Event, tag="checkpoint.released", frozen=True, kw_only=True):
    """The frozen source was killed."""

    frozen_ms: float | None = None
    """CRIU's own frozen_time, less what it was kept waiting; None if this agent did not make the dump."""


class SourceBack(Event, tag="checkpoint.aborted", frozen=True, kw_only=True):
    """The source serves, or was never stopped."""


class CheckpointFailed(Event, tag="checkpoint.failed", frozen=True, kw_only=True):
    identity = ("verb", "attempt")
    verb: str
    attempt: Count
    error: ErrorBody


# What the restore agent saw.


class TargetReady(Event, tag="restore.prepared", frozen=True, kw_only=True):
    """The port is bound and keeps what arrives; CRIU stands ready."""

    image: str


class Restored(Event, tag="restore.restored", frozen=True, kw_only=True):
    """The process is rebuilt in the target and has not run yet."""

    took_ms: float
    """From the request to CRIU to its pre-resume notification."""


class Resumed(Event, tag="restore.resumed", frozen=True, kw_only=True):
    """The target runs and has adopted the parked socket."""

    took_ms: float
    queued: Count
    """Bytes that were waiting in the parked socket."""
    restore_ms: float | None = None
    """CRIU's own restore_time; None if this agent did not restore."""


class TargetCleared(Event, tag="restore.aborted", frozen=True, kw_only=True):
    """Nothing of this migration is left in the target berth."""


class RestoreFailed(Event, tag="restore.failed", frozen=True, kw_only=True):
    identity = ("verb", "attempt")
    verb: str
    attempt: Count
    error: ErrorBody


# What the server wrapper saw.


class MigrateSent(Event, tag="server.migrate", frozen=True, kw_only=True):
    clients: Count
    """Clients told."""


class AckSeen(Event, tag="server.ack", frozen=True, kw_only=True):
    identity = ("client",)
    client: Name
    after_ms: float


class Quiesced(Event, tag="server.quiesced", frozen=True, kw_only=True):
    """The wait for acks and for applications is over; the server is about to stand still."""

    acks: Count
    clients: Count
    ready: Count
    """Clients that asked to be told and said it is safe to dump."""
    closed: Count
    """Connections without hello, closed."""


class Adopted(Event, tag="server.adopted", frozen=True, kw_only=True):
    outcome: Literal["moved", "rolled_back"]
    still_ms: float
    """How long the process stood still, by the wall clock."""


class ClientArrived(Event, tag="server.client", frozen=True, kw_only=True):
    """A client's own account of the move."""

    identity = ("client", "source")
    client: Name
    source: Literal["wrapper", "application"]
    interruption_ms: float
    """Last good data before to first good data after, as that client measured it."""


Seen = (
    CancelAsked
    | TimedOut
    | CallFailed
    | Armed
    | Disarmed
    | SourceReady
    | PreDumped
    | SourceHeld
    | Dumped
    | SourceGone
    | SourceBack
    | CheckpointFailed
    | TargetReady
    | Restored
    | Resumed
    | TargetCleared
    | RestoreFailed
    | MigrateSent
    | AckSeen
    | Quiesced
    | Adopted
    | ClientArrived
)

AnyEvent = Decision | Seen


def kind(event: Event) -> str:
    """``<source>.<event>``."""
    return str(event.__struct_config__.tag)


def subject(event: Event) -> str:
    """The subject an event is published on."""
    source, name = kind(event).split(".", 1)
    if source == "decision":
        return subjects.decision(event.id)
    return subjects.seen(event.id, source, name)


def message_id(event: Event) -> str:
    """The ``Nats-Msg-Id``: equal for two publishes of the same event."""
    parts = [str(getattr(event, field)) for field in event.identity]
    return "/".join([event.id, kind(event), *parts])
