"""Reading a JetStream stream in order: what is there now, and what comes, whatever happens to the server.

An ordered pull consumer: nameless state in the server's memory that we make again, from where we were, whenever
anything is amiss. One pull is outstanding at a time, so no more than a batch is ever buffered.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final, NamedTuple

import nats.errors
import nats.js.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api

from quicferry.bus.connection import Bus
from quicferry.bus.refusals import refused
from quicferry.protocol.errors import FerryError

log = structlog.get_logger()

BATCH: Final = 256
PULL_SECONDS: Final = 30.0
HEARTBEAT_SECONDS: Final = 2.0
SILENCE_SECONDS: Final = 5.0
"""Two heartbeats missed: the consumer is gone."""
API_SECONDS: Final = 2.0
INACTIVE_SECONDS: Final = 30.0
FIRST_WAIT: Final = 0.05
LONGEST_WAIT: Final = 2.0
REPLAY_ATTEMPTS: Final = 5
_STREAM_NOT_FOUND: Final = 10059


class Message(NamedTuple):
    subject: str
    data: bytes
    headers: dict[str, str] | None
    seq: int
    pending: int
    """How many more there were when the server sent this one."""
    at_ms: int
    """When NATS stored it, by its own clock (Unix time, milliseconds)."""


class StreamGoneError(FerryError):
    """The stream was deleted, or is not the one that was read before."""

    def __init__(self, message: str) -> None:
        super().__init__("nats_unreachable", message, hint="Start again: it will be made anew.")


class _Broken(Exception):  # noqa: N818  # not an error: the consumer is to be made again
    """The consumer can't be relied on any more."""


async def follow(bus: Bus, stream: str, subject: str, *, from_seq: int = 1) -> AsyncGenerator[Message, None]:
    """Every message from ``from_seq`` on, in order, each once, for ever.

    Raises FerryError ``nats_unreachable`` when the connection has ended for good or the stream is gone or another.
    """
    wait = FIRST_WAIT
    while True:
        try:
            await bus.ready()
            await _check_stream(bus, stream, from_seq)
            async with _consumer(bus, stream, subject, from_seq=from_seq) as consumer:
                while True:
                    message = await consumer.next()
                    wait = FIRST_WAIT
                    from_seq = message.seq + 1
                    yield message
        except _Broken as why:
            log.debug("consumer_renewed", stream=stream, why=str(why))
        except FerryError as error:
            if bus.closed.is_set() or error.code == "nats_denied" or isinstance(error, StreamGoneError):
                raise
            log.info("consumer_waiting", stream=stream, error=error.message)
            await asyncio.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT)


async def replay(bus: Bus, stream: str, subject: str, *, from_seq: int = 1) -> AsyncGenerator[Message, None]:
    """Every message from ``from_seq`` on that is there now, in order, then the end.

    In a cluster the replica that is read may not have the newest ones yet. Raises the FerryErrors of ``Bus.within``.
    """
    attempt = 1
    while True:
        try:
            async with _consumer(bus, stream, subject, from_seq=from_seq) as consumer:
                left = consumer.pending
                while left > 0:
                    message = await consumer.next()
                    from_seq = message.seq + 1
                    left = min(left - 1, message.pending)
                    yield message
                return
        except _Broken as why:
            if attempt == REPLAY_ATTEMPTS:
                raise FerryError("nats_unreachable", f"Reading {stream} was interrupted: {why}.") from None
            attempt += 1


async def latest(bus: Bus, stream: str, subject: str) -> tuple[list[Message], int]:
    """The last message of each subject under ``subject``, and what time it is by NATS's clock, as ``at_ms``.

    Raises the FerryErrors of ``Bus.within``.
    """
    attempt = 1
    while True:
        found: list[Message] = []
        try:
            async with _consumer(bus, stream, subject, last_per_subject=True) as consumer:
                left = consumer.pending
                while left > 0:
                    found.append(await consumer.next())
                    left = min(left - 1, found[-1].pending)
                return found, consumer.made_ms
        except _Broken as why:
            if attempt == REPLAY_ATTEMPTS:
                raise FerryError("nats_unreachable", f"Reading {stream} was interrupted: {why}.") from None
            attempt += 1


async def _check_stream(bus: Bus, stream: str, from_seq: int) -> None:
    """A stream that was deleted or made anew would leave us waiting for a number that never comes."""
    subject = f"{bus.settings.jetstream_prefix}.STREAM.INFO.{stream}"
    try:
        async with bus.within(API_SECONDS, subject, f"looking at {stream}"):
            info = await bus.js.stream_info(stream)
    except nats.js.errors.NotFoundError:
        raise StreamGoneError(f"The stream {stream} is gone.") from None
    except nats.js.errors.APIError as error:
        raise refused(error) from error
    if info.state.last_seq < from_seq - 1:
        raise StreamGoneError(
            f"The stream {stream} ends at {info.state.last_seq}, but {from_seq - 1} was read from it before."
        )


def _ms(time: datetime.datetime) -> int:
    return int(time.timestamp() * 1000)


@contextlib.asynccontextmanager
async def _consumer(
    bus: Bus, stream: str, subject: str, *, from_seq: int = 1, last_per_subject: bool = False
) -> AsyncIterator[_Consumer]:
    consumer = _Consumer(bus, stream)
    bus.on_reconnect.add(consumer.poke)
    try:
        await consumer.open(subject, from_seq, last_per_subject)
        yield consumer
    finally:
        bus.on_reconnect.discard(consumer.poke)
        await consumer.close()


class _Consumer:
    def __init__(self, bus: Bus, stream: str) -> None:
        self._bus = bus
        self._stream = stream
        # A batch, its status message and a few heartbeats; a put that has to wait holds back the socket's reader.
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue(BATCH + 16)
        self._inbox = bus.nats.new_inbox()
        self._subscription: Subscription | None = None
        self._name = f"q{self._inbox.rpartition('.')[2]}"
        self._seq = 0
        self._left = 0
        self._made = False
        self._poked = False
        self.pending = 0
        self.made_ms = 0

    async def open(self, subject: str, from_seq: int, last_per_subject: bool) -> None:
        api_subject = f"{self._bus.settings.jetstream_prefix}.CONSUMER.CREATE.{self._stream}.{self._name}.{subject}"
        start: dict[str, Any] = {"deliver_policy": api.DeliverPolicy.LAST_PER_SUBJECT}
        if not last_per_subject:
            start = {"deliver_policy": api.DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": max(from_seq, 1)}
        try:
            async with self._bus.within(API_SECONDS, api_subject, f"reading {self._stream}"):
                self._subscription = await self._bus.nats.subscribe(self._inbox, cb=self._queue.put)
                info = await self._bus.js.add_consumer(
                    self._stream,
                    name=self._name,
                    ack_policy=api.AckPolicy.NONE,
                    filter_subject=subject,
                    mem_storage=True,
                    num_replicas=1,
                    inactive_threshold=INACTIVE_SECONDS,
                    timeout=API_SECONDS + 1,
                    **start,
                )
        except nats.js.errors.APIError as error:
            if error.err_code == _STREAM_NOT_FOUND:
                raise StreamGoneError(f"The stream {self._stream} is gone.") from None
            raise refused(error) from error
        self._made = True
        self.pending = info.num_pending or 0
        self.made_ms = _ms(info.created)
        await self._pull()

    async def close(self) -> None:
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):  # it ends by itself when unused
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            if self._made and self._bus.nats.is_connected:
                await self._bus.nats.publish(
                    f"{self._bus.settings.jetstream_prefix}.CONSUMER.DELETE.{self._stream}.{self._name}"
                )

    def poke(self) -> None:
        """The server may have lost us; nothing that comes after this can be trusted."""
        self._poked = True
        if self._queue.empty():
            self._queue.put_nowait(None)

    async def next(self) -> Message:
        while True:
            if self._poked:
                raise _Broken("reconnected")
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    got = await self._queue.get()
            except TimeoutError:
                raise _Broken("no heartbeat") from None
            if got is None:
                continue
            status = (got.headers or {}).get(api.Header.STATUS)
            if status is None or got.reply.startswith("$JS.ACK."):
                return await self._take(got)
            if status == "100":
                continue
            about = (got.headers or {}).get(api.Header.DESCRIPTION, "")
            if status in ("404", "408") or (status == "409" and "Completed" in about):
                await self._pull()
                continue
            raise _Broken(f"{status} {about}")

    async def _take(self, got: Msg) -> Message:
        meta = got.metadata
        self._seq += 1
        if meta.sequence.consumer != self._seq:
            raise _Broken(f"message {meta.sequence.consumer} came where {self._seq} was due")
        self._left -= 1
        if self._left == 0:
            await self._pull()
        at_ms = _ms(meta.timestamp)
        return Message(got.subject, got.data, got.headers, meta.sequence.stream, meta.num_pending, at_ms)

    async def _pull(self) -> None:
        self._left = BATCH
        ask = {
            "batch": BATCH,
            "expires": int(PULL_SECONDS * 1e9),
            "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
        }
        try:
            await self._bus.nats.publish(
                f"{self._bus.settings.jetstream_prefix}.CONSUMER.MSG.NEXT.{self._stream}.{self._name}",
                json.dumps(ask).encode(),
                reply=self._inbox,
            )
        except nats.errors.Error as error:
            raise _Broken(str(error)) from None
