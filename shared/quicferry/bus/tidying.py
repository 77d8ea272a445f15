"""What a killed agent has left on its host the next one deletes, once the log says that its migration has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import structlog

from quicferry.bus.log import EventLog
from quicferry.protocol.errors import FerryError
from quicferry.protocol.events import Completed, Failed, RolledBack

log = structlog.get_logger(__name__)

AGAIN: Final = 5.0
"""Seconds until those are looked at again whose migration had not ended, or of which the log could not be read."""
UNKNOWN_AGE: Final = 7200.0
"""Seconds for which a migration that this log does not know is left alone: the directory may be shared with another
system, which has a log of its own. Longer than a migration takes."""


class Leftovers(Protocol):
    """Images, with keys in them, and the like. Both may raise OSError."""

    def migrations(self) -> Mapping[str, float]:
        """Those of which something is there, and how many seconds ago it was last begun."""
        ...

    def delete(self, migration: str) -> None:
        """Safe to repeat. Called in a thread."""
        ...


async def tidy(event_log: EventLog, leftovers: Leftovers, busy: Callable[[str], bool]) -> None:
    """Delete what is there now, each as soon as its migration has ended, and nothing that comes later; then return.

    ``busy``: whether a step of a migration runs here, which then sees to its own end.
    """
    left = set(_ages(leftovers))
    while left:
        ages = _ages(leftovers)
        left &= ages.keys()
        for migration in sorted(left):
            if not busy(migration) and await _is_over(event_log, migration, ages[migration]):
                await _delete(leftovers, migration)
                left.discard(migration)
        if left:
            await asyncio.sleep(AGAIN)


def _ages(leftovers: Leftovers) -> Mapping[str, float]:
    try:
        return leftovers.migrations()
    except OSError as error:
        log.warning("leftovers_unknown", error=str(error))
        return {}


async def _is_over(event_log: EventLog, migration: str, age: float) -> bool:
    try:
        decision = await event_log.newest_decision(migration)
    except FerryError as error:
        log.warning("leftovers_kept", id=migration, code=error.code, error=error.message)
        return False
    return age > UNKNOWN_AGE if decision is None else isinstance(decision, Completed | RolledBack | Failed)


async def _delete(leftovers: Leftovers, migration: str) -> None:
    try:
        await asyncio.to_thread(leftovers.delete, migration)
    except OSError as error:
        log.error("leftovers_kept", id=migration, error=str(error))
    else:
        log.info("leftovers_deleted", id=migration)
