"""What is where: berths, placements and locks, each in a key-value bucket. The log is the truth, these are caches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final, NamedTuple, TypeVar

import msgspec
import nats.js.errors
import structlog
from msgspec import structs
from nats.js.kv import KV_OP, KeyValue

from quicferry.bus import consumer
from quicferry.bus.connection import Bus
from quicferry.bus.refusals import WRONG_LAST_SEQUENCE, refused
from quicferry.bus.streams import ensure_bucket
from quicferry.protocol import subjects, wire
from quicferry.protocol.api import Berth, BerthReport, Placement
from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import Count, Name

log = structlog.get_logger()

T = TypeVar("T")

SECONDS: Final = 2.0
BERTH_MAX_AGE: Final = 3600.0
"""Seconds after which a berth that no agent reports any more is forgotten."""


def now_ms() -> int:
    """Unix time in milliseconds, by this host's clock."""
    return time.time_ns() // 1_000_000


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """Which migration holds a service, and since when (Unix time, milliseconds)."""

    id: Name
    at_ms: Count


class Placed(NamedTuple):
    placement: Placement | None
    revision: int
    """What :meth:`Registry.place` wants to know; 0 when there is no placement."""


class Sighted(NamedTuple):
    berths: list[Berth]
    now_ms: int
    """When they were read. This and their ``seen_ms`` are by NATS's clock, so that no two hosts' need agree."""


class Registry:
    """Made by :meth:`open`. Every method raises the FerryErrors of ``Bus.within``."""

    def __init__(self, bus: Bus, berths: KeyValue, placements: KeyValue, locks: KeyValue) -> None:
        self._bus = bus
        self._berths = berths
        self._placements = placements
        self._locks = locks

    @classmethod
    async def open(cls, bus: Bus) -> Registry:
        """Find the buckets or make them."""
        return cls(
            bus,
            await ensure_bucket(bus, subjects.BERTH_BUCKET, max_age=BERTH_MAX_AGE),
            await ensure_bucket(bus, subjects.PLACEMENT_BUCKET, history=5),
            await ensure_bucket(bus, subjects.LOCK_BUCKET),
        )

    async def put_berth(self, berth: Berth) -> None:
        """Report a berth as just seen."""
        key = subjects.berth_key(berth.node, berth.berth)
        async with self._using(subjects.BERTH_BUCKET, key):
            await self._bus.ready()  # what is sent while NATS is away would go out whenever it is back
            age_ms = max(0, now_ms() - berth.seen_ms)
            await self._berths.put(key, wire.encode(BerthReport(**structs.asdict(berth), age_ms=age_ms)))

    async def berths(self) -> list[Berth]:
        """Every berth reported within the last hour, by node and name."""
        return (await self.sighted()).berths

    async def sighted(self) -> Sighted:
        """The same, with the time: ``seen_ms`` says how fresh each one is."""
        reports, now = await self._dated(subjects.BERTH_BUCKET, BerthReport)
        found = [
            structs.replace(msgspec.convert(report, Berth, from_attributes=True), seen_ms=max(0, at - report.age_ms))
            for report, at in reports
        ]
        return Sighted(sorted(found, key=lambda berth: (berth.node, berth.berth)), now)

    async def placement(self, service: str) -> Placed:
        """Where ``service`` is, and the revision to change that."""
        try:
            async with self._using(subjects.PLACEMENT_BUCKET, service):
                entry = await self._placements.get(service)
        except nats.js.errors.KeyNotFoundError:
            return Placed(None, 0)
        return Placed(wire.decode(entry.value or b"", Placement), entry.revision or 0)

    async def placements(self) -> list[Placement]:
        """Every placement, by service."""
        return sorted(await self._all(subjects.PLACEMENT_BUCKET, Placement), key=lambda placement: placement.service)

    async def place(self, placement: Placement, revision: int) -> int:
        """Write ``placement`` if the bucket is still at ``revision``; returns the new revision.

        Raises FerryError ``log_conflict`` if it is not.
        """
        try:
            async with self._using(subjects.PLACEMENT_BUCKET, placement.service):
                return await self._placements.update(placement.service, wire.encode(placement), last=revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            raise FerryError("log_conflict", f"The placement of {placement.service} has changed meanwhile.") from None

    async def forget(self, service: str) -> None:
        """Forget a service that is gone for good, and its berths. An agent that still sees one reports it again."""
        for berth in await self.berths():
            if berth.service == service:
                key = subjects.berth_key(berth.node, berth.berth)
                async with self._using(subjects.BERTH_BUCKET, key):
                    await self._berths.delete(key)
        async with self._using(subjects.PLACEMENT_BUCKET, service):
            await self._placements.delete(service)

    async def lock(self, service: str, migration: str) -> bool:
        """Take the service's lock for ``migration``; False if another migration has it, True if this one does."""
        lock = Lock(id=migration, at_ms=now_ms())
        try:
            async with self._using(subjects.LOCK_BUCKET, service):
                await self._locks.create(service, wire.encode(lock))
        except nats.js.errors.KeyWrongLastSequenceError:
            holder = await self.lock_holder(service)
            return holder is not None and holder.id == migration
        return True

    async def lock_holder(self, service: str) -> Lock | None:
        """Who has the service's lock."""
        return (await self._lock(service))[0]

    async def locks(self) -> list[Lock]:
        """Every lock that is held."""
        return await self._all(subjects.LOCK_BUCKET, Lock)

    async def unlock(self, service: str, migration: str) -> None:
        """Give the lock back, if ``migration`` has it."""
        holder, revision = await self._lock(service)
        if holder is None or holder.id != migration:
            return
        # A conflict means that somebody else gave it back, or took it over, in between.
        with contextlib.suppress(nats.js.errors.KeyWrongLastSequenceError):
            async with self._using(subjects.LOCK_BUCKET, service):
                await self._locks.delete(service, last=revision)

    async def _lock(self, service: str) -> tuple[Lock | None, int]:
        try:
            async with self._using(subjects.LOCK_BUCKET, service):
                entry = await self._locks.get(service)
        except nats.js.errors.KeyNotFoundError:
            return None, 0
        return wire.decode(entry.value or b"", Lock), entry.revision or 0

    @contextlib.asynccontextmanager
    async def _using(self, bucket: str, key: str) -> AsyncIterator[None]:
        try:
            async with self._bus.within(SECONDS, f"$KV.{bucket}.{key}", f"using the bucket {bucket}"):
                yield
        except nats.js.errors.KeyValueError:  # not found, or changed meanwhile: that is for the caller
            raise
        except nats.js.errors.APIError as error:
            if error.err_code in WRONG_LAST_SEQUENCE:  # nats-py leaves it as it is when it deletes
                raise nats.js.errors.KeyWrongLastSequenceError(error.description) from error
            raise refused(error, f"the bucket {bucket}") from error

    async def _all(self, bucket: str, kind: type[T]) -> list[T]:
        return [value for value, _ in (await self._dated(bucket, kind))[0]]

    async def _dated(self, bucket: str, kind: type[T]) -> tuple[list[tuple[T, int]], int]:
        """Each value with when it was written, and the time now."""
        found: list[tuple[T, int]] = []
        messages, now = await consumer.latest(self._bus, f"KV_{bucket}", f"$KV.{bucket}.>")
        for message in messages:
            headers = message.headers or {}
            if headers.get(KV_OP) or headers.get("Nats-Marker-Reason"):  # deleted, purged or expired
                continue
            try:
                found.append((wire.decode(message.data, kind), message.at_ms))
            except FerryError as error:  # somebody wrote it by hand, or a newer version did
                log.warning("bucket_entry_unreadable", bucket=bucket, subject=message.subject, error=str(error))
        return found, now
