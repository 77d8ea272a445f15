"""The client's part of a move: hears the server on the control stream, swaps the peer, and says so."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog

from quicferry import faults
from quicferry.protocol import control
from quicferry.protocol.control import (
    Ack,
    FromClient,
    FromServer,
    Hello,
    LineDecoder,
    Migrate,
    Moved,
    Ready,
    Rollback,
)
from quicferry.protocol.errors import FerryError
from quicferry.quic.adapter import Stream, StreamConnection
from quicferry.quic.addresses import Peer, shown
from quicferry.quic.migration import Migration, Outcome
from quicferry.quic.policy import Policy
from quicferry.quic.swappable import SwappablePeer

log = structlog.get_logger(__name__)

QuiesceHook = Callable[[Migration], Awaitable[None]]
"""The application's own: returns once it has nothing under way and the server may be dumped."""

REMEMBERED: Final = 64
MAX_INTERRUPTION_MS: Final = 3_600_000
"""What ``moved`` can say; a connection that was idle for longer counts as this."""
PROBES: Final = ((1.0, 0.25), (10.0, 0.5), (float("inf"), 2.0))
"""Until so many seconds after ``migrate``, a silent client pings every so many seconds: a target answers what it
has not heard yet, and an idle client would give it nothing to answer. Seldom: a silent client waits for nothing,
and five hundred of them must not drown those that do."""


class Follower:
    """Owns the control stream and the pending move of one connection."""

    def __init__(
        self, connection: StreamConnection, seam: SwappablePeer, *, policy: Policy, on_quiesce: QuiesceHook | None
    ) -> None:
        self.seen = asyncio.Event()
        """Set when a move is heard of; the event of the next move is another one."""
        self.history: deque[Migration] = deque(maxlen=REMEMBERED)
        self.seam = seam
        self._connection = connection
        self._policy = policy
        self._on_quiesce = on_quiesce
        self._pending: Migration | None = None
        self._epoch = 0
        self._control: Stream | None = None
        self._decoder: LineDecoder[FromServer] = LineDecoder(FromServer)
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing: asyncio.TimerHandle | None = None
        self._quiescing: asyncio.Task[None] | None = None
        seam.on_target_heard = self._target_heard

    @property
    def current(self) -> Migration | None:
        """The newest move, ended or not."""
        return self.history[-1] if self.history else None

    @property
    def has_control(self) -> bool:
        return self._control is not None

    def start(self, name: str) -> None:
        """Open the control stream, the connection's first, and say hello."""
        self._control = self._connection.new_stream()
        self._control.sink = self._hear
        self._tell(Hello(client=name, quiesce=self._on_quiesce is not None))
        self._spawn(self._listen(self._control))

    def report_interruption(self, interruption_ms: float, migration: Migration | None = None) -> None:
        """Tell the server what the application measured. Raises ValueError without a move, or out of range."""
        migration = migration or self.current
        if migration is None:
            raise ValueError("no move was seen")
        if not 0 <= interruption_ms <= MAX_INTERRUPTION_MS:
            raise ValueError(f"{interruption_ms} ms is not between 0 and {MAX_INTERRUPTION_MS}")
        self._tell(Moved(id=migration.id, source="application", interruption_ms=round(interruption_ms, 3)))

    def stop(self) -> None:
        """The connection is over."""
        self._control = None
        if self._pending is not None:
            self._finish(self._pending, "closed")
        for task in self._tasks:
            task.cancel()

    # The control stream.

    def _hear(self, data: bytes) -> None:
        """At once: of two moves in a row, the first target's datagrams may be in the queue behind its ``migrate``."""
        try:
            for message in self._decoder.feed(data):
                if isinstance(message, Migrate):
                    self._migrate(message)
                else:
                    self._rollback(message)
        except FerryError as error:
            log.error("control_stream_broken", code=error.code, reason=str(error))
            if self._control is not None:
                self._control.abort()
        except Exception:  # we are called from within QUIC: a defect of ours must not cost the session
            log.exception("control_line_failed")

    async def _listen(self, stream: Stream) -> None:
        """Until the control stream ends."""
        try:
            await stream.reader.read()
            log.info("control_stream_ended")
            stream.close()
        except ConnectionError as error:
            log.info("control_stream_lost", reason=str(error))
        if self._control is stream:
            self._control = None

    def _tell(self, message: FromClient) -> None:
        if self._control is None:
            return
        try:
            self._control.write(control.encode(message))
        except ConnectionResetError:
            self._control = None
            return
        self._connection.transmit_now()

    # Moves.

    def _migrate(self, message: Migrate) -> None:
        if self._pending is not None and self.seam.speaking == self.seam.pending:
            self._target_heard()  # this is the target's first word, and it is about to move on
        known = next((past for past in self.history if past.id == message.id), None)
        if known is not None and (known.target == message.address or known.outcome is not None):
            log.info("migrate_repeated", id=message.id)
            self._tell(Ack(id=message.id))
            return
        if message.epoch and message.epoch <= self._epoch:
            self._refuse(message, f"{control.OUTDATED}: epoch {message.epoch}, the server is at {self._epoch}")
            return
        try:
            target = self._policy.resolve(message.addr, message.port, self.seam.peer)
            self.seam.check_reach(target)
        except ValueError as error:
            self._refuse(message, f"{message.addr} is {error}")
            return
        except OSError as error:
            self._refuse(message, str(error))
            return
        self._swap(message, target)

    def _swap(self, message: Migrate, target: Peer) -> None:
        migration = Migration(message.id, message.address, message.epoch)
        faults.strike("client.told")
        # The ack leaves before the swap: the old path is known to work.
        self._tell(Ack(id=message.id))
        faults.strike("client.acked")
        self.seam.begin(target)
        if self._pending is not None:
            self._finish(self._pending, "replaced")
        self._pending = migration
        self.history.append(migration)
        log.info("migrate_seen", id=migration.id, target=shown(target), epoch=migration.epoch)
        self.seen.set()
        if target == self.seam.peer:
            self._target_heard()  # the address stays: there is nothing to tell the two servers apart by
            return
        self._connection.probe()
        self._keep_probing()
        if self._quiescing is not None:
            self._quiescing.cancel()
        if self._on_quiesce is not None:
            self._quiescing = self._spawn(self._quiesce(migration, message.quiesce_ms / 1000))

    def _refuse(self, message: Migrate, reason: str) -> None:
        log.warning("migrate_refused", id=message.id, reason=reason)
        self._tell(Ack(id=message.id, refused=reason[: control.MAX_REFUSAL]))

    def _rollback(self, message: Rollback) -> None:
        if self._pending is None or self._pending.id != message.id:
            log.info("rollback_ignored", id=message.id)
            return
        self.seam.abandon()
        log.info("rolled_back", id=message.id, peer=shown(self.seam.peer))
        self._finish(self._pending, "rolled_back")
        # What was sent into the pause may be lost, and our timer has backed off to many seconds by now.
        self._connection.probe()

    def _target_heard(self) -> None:
        migration = self._pending
        if migration is None:
            return
        seam = self.seam
        faults.strike("client.heard")
        now, now_unix = time.monotonic(), time.time()
        migration.last_before, migration.first_after = seam.heard_at_unix, now_unix
        silence_ms = migration.interruption_ms = (now - seam.heard_at) * 1000
        seam.pin()
        seam.heard_at, seam.heard_at_unix = now, now_unix
        self._epoch = max(self._epoch, migration.epoch)
        self._finish(migration, "arrived")
        # Behind the application, which may have waited for what came with the target's first word.
        asyncio.get_running_loop().call_soon(self._say_arrived, migration.id, seam.peer, silence_ms)

    def _say_arrived(self, migration: str, peer: Peer, silence_ms: float) -> None:
        log.info("target_heard", id=migration, peer=shown(peer), silence_ms=round(silence_ms, 1))
        said = min(round(silence_ms, 3), MAX_INTERRUPTION_MS)
        self._tell(Moved(id=migration, source="wrapper", interruption_ms=said))

    def _finish(self, migration: Migration, outcome: Outcome) -> None:
        if self._pending is migration:
            self._pending = None
            if self._probing is not None:
                self._probing.cancel()
                self._probing = None
        if not migration.last_before:
            migration.last_before = self.seam.heard_at_unix
        # The next move's signal is a fresh one, so that each fires once.
        if self.seen.is_set():
            self.seen = asyncio.Event()
        migration.end(outcome)

    async def _quiesce(self, migration: Migration, limit: float) -> None:
        if self._on_quiesce is None:
            return
        try:
            async with asyncio.timeout(limit):
                await self._on_quiesce(migration)
        except TimeoutError:
            log.warning("application_not_quiet", id=migration.id, after_ms=round(limit * 1000))
            return
        except Exception:  # an application's defect costs it the courtesy, not its session
            log.exception("on_quiesce_failed", id=migration.id)
            return
        self._tell(Ready(id=migration.id))

    # Something for the target to answer.

    def _keep_probing(self) -> None:
        migration = self._pending
        if migration is None:
            return
        age = time.monotonic() - migration.seen_at
        every = next(every for until, every in PROBES if age < until)
        if time.monotonic() - self.seam.sent_at >= every:
            self._connection.probe()
        self._probing = asyncio.get_running_loop().call_later(every, self._keep_probing)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
