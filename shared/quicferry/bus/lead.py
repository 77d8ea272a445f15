"""Which coordinator leads: one record in a key-value bucket, written with compare-and-set.

The bucket knows no time. Who renews the record leads; who sees it unchanged for long enough may write its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Final, NamedTuple

import msgspec
import nats.js.errors
import structlog
from nats.js.kv import KeyValue

from quicferry.bus.connection import Bus
from quicferry.bus.refusals import refused
from quicferry.bus.streams import ensure_bucket
from quicferry.protocol import subjects, wire
from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import Count

log = structlog.get_logger()

SECONDS: Final = 0.8
"""Of one exchange: short, so that one that is lost can be tried again before the lease is over."""
LONGEST_LEASE_MS: Final = 60_000


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the record says."""

    holder: Annotated[str, msgspec.Meta(max_length=128)]
    """The coordinator that leads; empty when it gave the lead up."""
    lease_ms: Annotated[int, msgspec.Meta(ge=0, le=LONGEST_LEASE_MS)] = 0
    """For how long each renewal counts."""
    since_ms: Count = 0
    """When its lead began (Unix time, milliseconds): for people, nobody reckons with it."""
    renewal: Count = 0
    """Counts the renewals, so that no two records are alike."""


class Held(NamedTuple):
    claim: Claim | None
    """None when there is no record."""
    revision: int
    """What :meth:`LeadLock.write` wants to know; 0 when there is no record."""


class LeadLock:
    """Made by :meth:`open`. Every method raises the FerryErrors of ``Bus.within``."""

    def __init__(self, bus: Bus, bucket: KeyValue) -> None:
        self._bus = bus
        self._bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> LeadLock:
        """Find the bucket or make it. On disk: a lock that a restart of NATS forgets would be free too early."""
        return cls(bus, await ensure_bucket(bus, subjects.LEAD_BUCKET))

    async def make(self) -> None:
        """Make the bucket anew if it is gone."""
        await ensure_bucket(self._bus, subjects.LEAD_BUCKET)

    async def read(self) -> Held:
        """The record as it is."""
        try:
            async with self._using("reading"):
                entry = await self._bucket.get(subjects.LEAD_KEY)
        except nats.js.errors.KeyNotFoundError:
            return Held(None, 0)
        except nats.js.errors.APIError as error:
            raise refused(error) from error
        try:
            claim = wire.decode(entry.value or b"", Claim)
        except FerryError as error:
            # By hand, or by a version of tomorrow: somebody's all the same, until it stays unchanged for long.
            log.warning("lead_unreadable", error=error.message, path=error.path)
            claim = Claim(holder="unreadable", lease_ms=LONGEST_LEASE_MS)
        return Held(claim, entry.revision or 0)

    async def write(self, claim: Claim, revision: int) -> int:
        """Write ``claim`` if the record is still at ``revision``; returns the new revision.

        Raises FerryError ``log_conflict`` if it is not: somebody else wrote, or we did and never heard of it.
        """
        body = wire.encode(claim)
        try:
            async with self._using("writing"):
                await self._bus.ready()  # what is sent while NATS is away would go out whenever it is back
                if revision:
                    return await self._bucket.update(subjects.LEAD_KEY, body, last=revision)
                return await self._bucket.create(subjects.LEAD_KEY, body)
        except nats.js.errors.KeyWrongLastSequenceError:
            raise FerryError("log_conflict", "Another coordinator has taken the lead meanwhile.") from None
        except nats.js.errors.APIError as error:
            raise refused(error) from error

    @contextlib.asynccontextmanager
    async def _using(self, what: str) -> AsyncIterator[None]:
        subject = f"$KV.{subjects.LEAD_BUCKET}.{subjects.LEAD_KEY}"
        async with self._bus.within(SECONDS, subject, f"{what} who leads"):
            yield
