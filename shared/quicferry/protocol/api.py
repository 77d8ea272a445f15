"""The public API: what anybody may send to the coordinator, and what it answers."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import msgspec

from quicferry.protocol.errors import ErrorBody
from quicferry.protocol.wire import Count, Millis, Name, Port

Rounds = Annotated[int, msgspec.Meta(ge=0, le=8)]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where clients reach a berth: an IP address literal, not the unspecified one, and a UDP port."""

    host: Annotated[str, msgspec.Meta(min_length=2, max_length=45)]
    port: Port

    def __post_init__(self) -> None:
        # Every client refuses to go anywhere else, and a server that leaves closes those who do.
        try:
            ip = ipaddress.ip_address(self.host)
        except ValueError:
            raise ValueError(f"{self.host!r} is not an IP address literal") from None
        if (getattr(ip, "ipv4_mapped", None) or ip).is_unspecified:
            raise ValueError(f"{self.host!r} is the unspecified address, which nobody can send to")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A berth on a node, and the address clients reach it by."""

    node: Name
    berth: Name
    address: Address


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one migration is run; every limit in milliseconds."""

    ack_timeout_ms: Millis = 2_000
    """How long the server waits for its clients' acks; it serves meanwhile, so waiting costs no pause."""
    quiesce_timeout_ms: Millis = 1_000
    """How long applications that asked to be told may take to say it is safe to dump."""
    phase_timeout_ms: Millis = 10_000
    """How long any phase before the commit may take; then the migration rolls back."""
    settle_timeout_ms: Millis = 3_000
    """How long after the resume clients may take to arrive before the migration completes without them."""
    pre_copy_rounds: Rounds = 0
    """Rounds of pre-dump while the server serves; needs a kernel that tracks dirty pages."""


class MigrateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Asks for one migration. The same ``id`` twice is one migration."""

    service: Name
    to: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9_-]{1,64}/)?[A-Za-z0-9_-]{1,64}$(?!\n)")] | None = None
    """``berth`` or ``node/berth``; an empty berth of the service is chosen when not given."""
    id: Name | None = None
    options: Options = Options()


class MigrateReply(msgspec.Struct, frozen=True, kw_only=True):
    """The migration is in the log; ``quicferry.log.<id>.>`` tells the rest."""

    id: str
    service: str
    source: Place
    target: Place
    epoch: Count


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Asks to roll a migration back; refused with ``too_late`` once it is committed."""

    id: Name


class CancelReply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    phase: str


class StatusRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One migration by ``id``, or the newest ``limit`` ones, of one ``service`` if given."""

    id: Name | None = None
    service: Name | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    id: str
    service: str
    source: Place
    target: Place
    epoch: Count
    phase: str
    outcome: str | None = None
    """``completed``, ``rolled_back`` or ``failed`` once it has ended."""
    requested_ms: Count
    """Unix time, in milliseconds."""
    acks: Count = 0
    clients: Count = 0
    reason: ErrorBody | None = None


class StatusReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    migrations: list[MigrationStatus]
    leader: str | None = None
    """The coordinator that leads, and answers: its host's name, its process id there, and a token."""


class Placement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a service is now; ``epoch`` counts its committed moves."""

    service: Name
    place: Place
    epoch: Count = 0
    migration: Name | None = None
    """The migration that put it there."""


class Berth(msgspec.Struct, frozen=True, kw_only=True):
    """A container that a server can live in, as its node's checkpoint agent last saw it."""

    node: Name
    berth: Name
    service: Name
    """The service whose port and address this berth is made for."""
    address: Address
    port: Port
    """The UDP port inside the berth."""
    occupied: bool
    container: str
    image: str
    seen_ms: Count
    """Unix time, in milliseconds: in its bucket by the agent's clock, in the coordinator's answer by NATS's."""

    @property
    def place(self) -> Place:
        return Place(node=self.node, berth=self.berth, address=self.address)


class BerthReport(Berth, frozen=True, kw_only=True):
    """A berth as its bucket has it."""

    age_ms: Count = 0
    """How long before it was reported it was seen, by the agent's clock alone; NATS knows when it was reported."""


class ServicesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Takes no fields."""


class ServicesReply(msgspec.Struct, frozen=True, kw_only=True):
    services: list[Placement]
    berths: list[Berth]


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """Any endpoint's answer to a request it refuses; the code is in the NATS micro headers too."""

    error: ErrorBody
