"""Feeds the log to the book, all of its past and then what comes, and to the driver while this coordinator leads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog

from quicferry import quiet
from quicferry.bus.log import EventLog
from quicferry.protocol import events as ev
from quicferry.protocol.errors import FerryError
from services.coordinator.book import Book, Taken

log = structlog.get_logger()

CATCH_UP_SECONDS: Final = 30.0
AGAIN: Final = 0.1
LAG_TRIES: Final = 30
"""To read as far as the log goes, if it has replicas, and the one that is read lags behind."""

Actor = Callable[[Taken], None]


class Follower:
    """``ready`` is set when all of the log's past is in the book. A standby's book is as current as the leader's."""

    def __init__(self, event_log: EventLog, book: Book) -> None:
        self.ready = asyncio.Event()
        self.actor: Actor | None = None
        """Called with what every entry came to."""
        self._log = event_log
        self._book = book

    async def run(self) -> None:
        """Ends only by an error or by being cancelled."""
        last, entries = await self._log.last_seq(), 0
        for _ in range(LAG_TRIES):
            async for entry in self._log.replay(from_seq=self._book.seq + 1, skipped=self._book.passed):
                self._book.take(entry)
                entries += 1
            if self._book.seq >= last:
                break
            await asyncio.sleep(AGAIN)
        else:
            log.warning("log_end_missing", last_seq=last, read=self._book.seq)
        read = self._book.seq
        self._book.passed(last)  # the last ones have left the log, or still come: nobody waits for them here
        unfinished = [state.request.id for state in self._book.unfinished()]
        log.info("log_replayed", entries=entries, unfinished=unfinished)
        self.ready.set()
        follow = self._log.follow(from_seq=read + 1, skipped=self._book.passed)
        async with contextlib.aclosing(follow) as coming:
            async for entry in coming:
                taken = self._book.take(entry)
                if taken is not None and self.actor is not None:
                    self.actor(taken)
                    asyncio.get_running_loop().call_later(quiet.LOGGED, _tell, taken)

    async def caught_up(self) -> None:
        """Wait until the book knows all that the log holds now. Raises FerryError ``no_answer`` after a while."""
        try:
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._book.reached(await self._last_seq())
        except TimeoutError:
            raise FerryError(
                "no_answer", f"The log could not be read up to its end in {CATCH_UP_SECONDS:g} s."
            ) from None

    async def _last_seq(self) -> int:
        while True:
            try:
                return await self._log.last_seq()
            except FerryError as error:
                if error.code == "nats_denied":
                    raise
                log.info("log_waiting", code=error.code, error=error.message)
            await asyncio.sleep(AGAIN)


def _tell(taken: Taken) -> None:
    before, state, event = taken.before, taken.state, taken.entry.event
    request, lines = state.request, log.bind(id=event.id)
    why = {"code": state.reason.code, "reason": state.reason.message} if state.reason else {}
    lines.debug("log_entry", seq=taken.entry.seq, kind=ev.kind(event))
    if before is None:
        lines.info(
            "migration_requested",
            service=request.service,
            source=f"{request.source.node}/{request.source.berth}",
            target=f"{request.target.node}/{request.target.berth}",
            epoch=request.epoch,
        )
    elif state.outcome is not None and before.outcome is None:
        lines.info(
            "migration_ended",
            outcome=state.outcome,
            acks=len(state.acks),
            clients=state.clients,
            took_ms=event.at_ms - request.at_ms,
            **why,
        )
    elif state.phase is not before.phase:
        lines.info("migration_phase", phase=state.phase.value, **why)
