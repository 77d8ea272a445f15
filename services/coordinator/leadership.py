"""One coordinator's part in deciding who leads: stands by, wins the lead, renews it, and knows when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Final

import structlog

from quicferry.bus.lead import Claim, Held, LeadLock
from quicferry.protocol.errors import FerryError
from services.coordinator.lease import LEASE, RENEW, Seen, Tenure, Vigil

log = structlog.get_logger()

LOOK: Final = 0.25
"""Seconds between two looks of a standby: a lead that was given up is taken after so long."""
AGAIN: Final = 0.1
GIVE_UP_SECONDS: Final = 0.3
MAKE_EVERY: Final = 10
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_-]+")


class LeadOverError(Exception):
    """This coordinator does not lead any more."""


def clock() -> float:
    """Seconds that go on while this process is stopped and while the machine sleeps (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def make_name() -> str:
    """Never the same twice: a coordinator that starts again is another one."""
    return f"{_NOT_IN_A_NAME.sub('-', socket.gethostname())[:40]}-{os.getpid()}-{secrets.token_hex(3)}"


class Leadership:
    """``check`` comes before everything that only the leader may do."""

    def __init__(self, lock: LeadLock, name: str) -> None:
        self.name = name
        self.standing_by = asyncio.Event()
        """Set when it is known that another one leads."""
        self._lock = lock
        self._tenure = Tenure()
        self._revision = 0
        self._renewal = 0
        self._since_ms = 0
        self._misses = 0

    @property
    def leads(self) -> bool:
        return self._tenure.left(clock()) > 0

    def check(self) -> None:
        """Raises FerryError ``not_leading`` when the lease is over, whether or not anybody has noticed yet."""
        if not self.leads:
            raise FerryError(
                "not_leading",
                "This coordinator has lost the lead to another one, or its connection to NATS.",
                hint="Ask again, with the same id: the coordinator that leads answers.",
            )

    async def win(self) -> None:
        """Return as soon as this coordinator leads, however long that takes. Raises FerryError ``nats_denied``."""
        vigil = Vigil()
        while True:
            with contextlib.suppress(_Missed):
                held = await self._read()
                if vigil.see(_seen(held), clock()) and self._is_others(held):
                    self.standing_by.set()
                    log.info("standing_by", name=self.name, leader=held.claim and held.claim.holder)
                if not self._is_others(held) or vigil.left(clock()) <= 0:
                    if self._is_others(held):
                        log.warning("lead_expired", name=self.name, leader=held.claim and held.claim.holder)
                    await self._begin(held)
                    return
            await asyncio.sleep(min(LOOK, max(vigil.left(clock()), AGAIN)))

    async def regain(self) -> bool:
        """After a lease that ran out: lead again, True, unless another one does by now, False."""
        while True:
            with contextlib.suppress(_Missed):
                held = await self._read()
                if self._is_others(held):
                    return False
                await self._begin(held)
                return True
            await asyncio.sleep(AGAIN)

    async def keep(self) -> None:
        """Renew for as long as it goes. Raises LeadOverError when it is over, FerryError ``nats_denied``."""
        try:
            while True:
                await asyncio.sleep(RENEW)
                async with asyncio.timeout(self._tenure.left(clock())):
                    await self._renew()
        except TimeoutError:
            self._tenure.over()
            log.warning("lead_lapsed", name=self.name)
            raise LeadOverError from None

    async def give_up(self) -> None:
        """Let another one take over at once. Nothing may be under way any more that needs the lead."""
        if not self.leads:
            return
        self._tenure.over()
        # A courtesy: without it the lease runs out by itself.
        with contextlib.suppress(FerryError, TimeoutError):
            async with asyncio.timeout(GIVE_UP_SECONDS):
                self._revision = await self._lock.write(Claim(holder=""), self._revision)
                log.info("lead_given_up", name=self.name)

    async def _begin(self, held: Held) -> None:
        self._since_ms = time.time_ns() // 1_000_000
        self._revision = held.revision
        await self._claim()
        log.info("leading", name=self.name, revision=self._revision)

    async def _renew(self) -> None:
        while True:
            try:
                await self._claim()
                return
            except _ConflictError:
                held = await self._read_again()
                if held.claim is None or held.claim.holder != self.name:
                    self._tenure.over()
                    leader = held.claim.holder if held.claim else ""
                    log.warning("lead_taken", name=self.name, leader=leader)
                    raise LeadOverError from None
                self._revision = held.revision  # our own: its answer was lost on the way
            except _Missed:
                await asyncio.sleep(AGAIN)

    async def _read_again(self) -> Held:
        while True:
            with contextlib.suppress(_Missed):
                return await self._read()
            await asyncio.sleep(AGAIN)

    async def _claim(self) -> None:
        asked_at = clock()
        self._renewal += 1
        claim = Claim(holder=self.name, lease_ms=round(LEASE * 1000), since_ms=self._since_ms, renewal=self._renewal)
        try:
            with _heeding_cancellation():
                self._revision = await self._lock.write(claim, self._revision)
        except FerryError as error:
            raise _missed(error) from error
        self._tenure.renewed(asked_at)

    async def _read(self) -> Held:
        try:
            with _heeding_cancellation():
                return await self._lock.read()
        except FerryError as error:
            self._misses += 1
            if self._misses % MAKE_EVERY == 0:  # somebody may have removed the bucket
                with contextlib.suppress(FerryError):
                    await self._lock.make()
            raise _missed(error) from error

    def _is_others(self, held: Held) -> bool:
        return held.claim is not None and held.claim.holder not in ("", self.name)


class _Missed(Exception):  # noqa: N818  # not an error: to be tried again
    """An exchange with NATS that came to nothing."""


class _ConflictError(_Missed):
    """The record is not what it was."""


@contextlib.contextmanager
def _heeding_cancellation() -> Iterator[None]:
    """Python 3.11's wait_for, which nats-py uses, loses a cancellation that comes together with its answer.

    Lost here, a coordinator that is to stop would renew its lead for ever. Only what came meanwhile counts: 3.11's
    TaskGroup leaves a task's count raised when one of its own tasks has failed.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    yield
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError


def _missed(error: FerryError) -> Exception:
    if error.code == "nats_denied":
        return error
    log.debug("lead_exchange_failed", code=error.code, error=error.message)
    return (_ConflictError if error.code == "log_conflict" else _Missed)(error.message)


def _seen(held: Held) -> Seen:
    if held.claim is None:
        return Seen("", held.revision, 0, 0.0)
    return Seen(held.claim.holder, held.revision, held.claim.renewal, held.claim.lease_ms / 1000)
