"""The event log: a JetStream file stream that decides what happens, and remembers what did."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final, NamedTuple

import nats.js.errors
import structlog
from nats.js import api

from quicferry.bus import consumer
from quicferry.bus.connection import Bus
from quicferry.bus.refusals import WRONG_LAST_SEQUENCE, refused
from quicferry.bus.streams import ensure_stream
from quicferry.protocol import events as ev
from quicferry.protocol import subjects, wire
from quicferry.protocol.errors import FerryError
from quicferry.protocol.events import AnyEvent, Decision

log = structlog.get_logger()

MAX_AGE: Final = 30 * 86_400.0
"""Seconds an entry is kept."""
MAX_BYTES: Final = 256 * 1024 * 1024
DUPLICATE_WINDOW: Final = 120.0
"""Seconds within which a repeated publish is recognised by its message id."""
ATTEMPTS: Final = 5
PUBLISH_SECONDS: Final = 2.0
FIRST_WAIT: Final = 0.05


class Entry(NamedTuple):
    """``seq`` is the entry's number in the whole log: what is later has a larger one."""

    seq: int
    event: AnyEvent
    at_ms: int = 0
    """When NATS stored it, by its own clock (Unix time, milliseconds). The event's is by its writer's."""


class EventLog:
    """Made by :meth:`open`."""

    def __init__(self, bus: Bus, permit: Callable[[], None] | None = None) -> None:
        self._bus = bus
        self._permit = permit

    @classmethod
    async def open(cls, bus: Bus, *, permit: Callable[[], None] | None = None) -> EventLog:
        """Find the stream or make it; waits while JetStream comes up behind the connection.

        ``permit`` is called right before anything is sent to be written, and raises if that may not be any more.
        Raises FerryError ``nats_unreachable`` or ``nats_denied``.
        """
        await ensure_stream(
            bus,
            api.StreamConfig(
                name=subjects.LOG_STREAM,
                description="quicferry: what was decided and seen in every migration",
                subjects=[subjects.LOG_ALL],
                storage=api.StorageType.FILE,
                retention=api.RetentionPolicy.LIMITS,
                discard=api.DiscardPolicy.OLD,
                max_age=MAX_AGE,
                max_bytes=MAX_BYTES,
                max_msg_size=wire.MAX_MESSAGE_BYTES,
                duplicate_window=DUPLICATE_WINDOW,
                allow_direct=True,
            ),
        )
        return cls(bus, permit)

    async def append(self, event: AnyEvent) -> int:
        """Write what was seen; returns its sequence number. The same event twice is one entry.

        Retries a few times, about 10 s in all. Raises the FerryErrors of ``Bus.within``.
        """
        try:
            return (await self._publish(event, {})).seq
        except nats.js.errors.APIError as error:
            raise refused(error) from error

    async def decide(self, event: Decision, *, after: int) -> int:
        """Write a decision, if the newest one of its migration is still entry ``after`` (0: there is none).

        Raises FerryError ``log_conflict`` when another coordinator was first, else as :meth:`append`.
        """
        try:
            ack = await self._publish(event, {api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE: str(after)})
            if not ack.duplicate:
                return ack.seq
        except nats.js.errors.APIError as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise refused(error) from error
        # Either another coordinator was first, or it is our own, whose answer was lost on the way.
        newest = await self._newest_decision(event.id)
        entry = newest and _decode(*newest)
        if entry is None or entry.event != event:
            raise FerryError("log_conflict", f"The log of {event.id} already has another decision.")
        return entry.seq

    async def newest_decision(self, migration: str) -> AnyEvent | None:
        """None when the log knows nothing of the migration.

        Raises FerryError ``log_unreadable`` when the decision is of no form known here, and those of ``Bus.within``.
        """
        newest = await self._newest_decision(migration)
        if newest is None:
            return None
        entry = _decode(*newest)
        if entry is None:
            raise FerryError("log_unreadable", f"The newest decision about {migration} can't be read.")
        return entry.event

    async def read(self, migration: str) -> list[Entry]:
        """The whole history of one migration, in order; empty if there is none."""
        return [entry async for entry in self.replay(migration=migration)]

    def replay(
        self,
        *,
        migration: str | None = None,
        from_seq: int = 1,
        skipped: Callable[[int], None] | None = None,
    ) -> AsyncGenerator[Entry, None]:
        """What is in the log now, in order, of one migration or of all; then it ends.

        ``skipped`` as in :meth:`follow`. With replicas it may end before :meth:`last_seq`: the one read from may lag.
        """
        messages = consumer.replay(self._bus, subjects.LOG_STREAM, _filter(migration), from_seq=from_seq)
        return _entries(messages, skipped)

    def follow(
        self,
        *,
        migration: str | None = None,
        from_seq: int = 1,
        skipped: Callable[[int], None] | None = None,
    ) -> AsyncGenerator[Entry, None]:
        """Every entry from ``from_seq`` on, then what comes, for ever; outlives restarts of the server.

        Entries that are not of their form are logged and passed over; ``skipped`` is called with their numbers, in
        order. Close it (``contextlib.aclosing``) when done.
        """
        messages = consumer.follow(self._bus, subjects.LOG_STREAM, _filter(migration), from_seq=from_seq)
        return _entries(messages, skipped)

    async def last_seq(self) -> int:
        """The newest entry's number; 0 in an empty log."""
        subject = f"{self._bus.settings.jetstream_prefix}.STREAM.INFO.{subjects.LOG_STREAM}"
        async with self._bus.within(PUBLISH_SECONDS, subject, "looking at the log"):
            try:
                state = (await self._bus.js.stream_info(subjects.LOG_STREAM)).state
            except nats.js.errors.APIError as error:
                raise refused(error) from error
        return int(state.last_seq) if state.messages else 0  # what was purged is still counted

    async def _publish(self, event: AnyEvent, headers: dict[str, str]) -> api.PubAck:
        headers = {api.Header.MSG_ID: ev.message_id(event), **headers}
        subject, body = ev.subject(event), wire.encode(event)
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self._bus.within(PUBLISH_SECONDS, subject, f"writing {ev.kind(event)} to the log"):
                    await self._bus.ready()
                    if self._permit is not None:
                        self._permit()
                    return await self._bus.js.publish(
                        subject,
                        body,
                        timeout=PUBLISH_SECONDS + 1,
                        stream=subjects.LOG_STREAM,
                        headers=dict(headers),
                    )
            except FerryError as error:
                if error.code not in ("no_answer", "nats_unreachable") or attempt == ATTEMPTS:
                    raise
                log.warning("log_retry", id=event.id, kind=ev.kind(event), attempt=attempt, error=error.message)
            await asyncio.sleep(wait)  # outside the try: it is the server that needs the pause
            wait *= 3
        raise AssertionError("unreachable")

    async def _newest_decision(self, migration: str) -> tuple[str, bytes, int] | None:
        """Subject, data and number."""
        decision = subjects.decision(migration)
        subject = f"{self._bus.settings.jetstream_prefix}.DIRECT.GET.{subjects.LOG_STREAM}.{decision}"
        async with self._bus.within(PUBLISH_SECONDS, subject, "reading the log"):
            try:
                found = await self._bus.js.get_last_msg(subjects.LOG_STREAM, decision, direct=True)
            except nats.js.errors.NotFoundError:
                return None
            except nats.js.errors.APIError as error:
                raise refused(error) from error
        return found.subject or "", found.data or b"", found.seq or 0


def _filter(migration: str | None) -> str:
    return subjects.LOG_ALL if migration is None else subjects.log_of(migration)


async def _entries(
    messages: AsyncGenerator[consumer.Message, None], skipped: Callable[[int], None] | None
) -> AsyncGenerator[Entry, None]:
    async with contextlib.aclosing(messages):
        async for message in messages:
            if entry := _decode(message.subject, message.data, message.seq):
                yield entry._replace(at_ms=message.at_ms)
            elif skipped is not None:
                skipped(message.seq)


def _decode(subject: str, data: bytes, seq: int) -> Entry | None:
    try:
        event: AnyEvent = wire.decode(data, AnyEvent)
    except FerryError as error:
        log.warning("log_entry_unreadable", seq=seq, subject=subject, error=error.message, path=error.path)
        return None
    if ev.subject(event) != subject:
        # Permissions are granted by subject: an entry that claims another one is not believed.
        log.warning("log_entry_misplaced", id=event.id, seq=seq, subject=subject, kind=ev.kind(event))
        return None
    return Entry(seq, event)
