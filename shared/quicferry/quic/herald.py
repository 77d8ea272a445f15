"""What the server wrapper tells the world, without ever waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Final, Protocol

import structlog

from quicferry.protocol import events
from quicferry.protocol.events import AnyEvent

log = structlog.get_logger(__name__)

KEPT: Final = 4096
"""Events kept while nobody takes them; then the oldest is dropped."""


class Herald(Protocol):
    """Publishes events; may be slow, may wait for a broker, may raise: QUIC never notices."""

    async def publish(self, event: AnyEvent) -> None: ...

    async def suspend(self) -> None:
        """Close every connection to the broker: the process is about to be dumped."""

    async def resume(self) -> None:
        """Connect again, in the background."""


class SilentHerald:
    """For a server without a broker: events are log lines."""

    async def publish(self, event: AnyEvent) -> None:
        log.info("event", kind=events.kind(event), id=event.id)

    async def suspend(self) -> None:
        return

    async def resume(self) -> None:
        return


class Outbox:
    """A bounded queue before a herald. What is not out when the process is dumped travels with it."""

    def __init__(self, herald: Herald) -> None:
        self._herald = herald
        self._waiting: deque[AnyEvent] = deque()
        self._something = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._may_run = asyncio.Event()
        self._may_run.set()
        self._current: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="outbox")

    def put(self, event: AnyEvent) -> None:
        """Never waits."""
        if len(self._waiting) >= KEPT:
            lost = self._waiting.popleft()
            log.warning("event_dropped", kind=events.kind(lost), id=lost.id)
        self._waiting.append(event)
        self._empty.clear()
        self._something.set()

    async def suspend(self, *, flush: float, close: float) -> None:
        """Give the herald ``flush`` seconds to publish what waits and ``close`` seconds to disconnect."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(flush):
                await self._empty.wait()
        self._may_run.clear()
        if self._current is not None:
            self._current.cancel()
            await asyncio.wait([self._current], timeout=close)
        try:
            async with asyncio.timeout(close):
                await self._herald.suspend()
        except TimeoutError:
            log.error("herald_still_connected", after_s=close)
        except Exception:  # whatever the broker's client raises, the move goes on
            log.exception("herald_suspend_failed")

    async def resume(self) -> None:
        try:
            await self._herald.resume()
        except Exception:  # whatever the broker's client raises, the server serves
            log.exception("herald_resume_failed")
        self._may_run.set()

    async def stop(self) -> None:
        """End; what still waits is lost."""
        for task in (self._task, self._current):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    async def _run(self) -> None:
        while True:
            await self._something.wait()
            await self._may_run.wait()
            if not self._waiting:
                self._something.clear()
                self._empty.set()
                continue
            event = self._waiting[0]
            self._current = asyncio.create_task(self._publish(event), name="publish")
            await asyncio.wait([self._current])
            done, self._current = self._current, None
            # A publish cut short by a suspension is repeated: message ids make that safe.
            if not done.cancelled() and self._waiting and self._waiting[0] is event:
                self._waiting.popleft()

    async def _publish(self, event: AnyEvent) -> None:
        try:
            await self._herald.publish(event)
        except Exception:  # whatever the broker's client raises, the server serves
            log.exception("event_not_published", kind=events.kind(event), id=event.id)
