"""The server's part of a move, from SIGTERM to the adopted socket."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

import structlog

from quicferry import faults, quiet
from quicferry.protocol import events
from quicferry.protocol.agents import ARE_YOU_THERE, ArmRequest
from quicferry.protocol.api import Address, Options
from quicferry.protocol.control import Ack, Moved, Ready
from quicferry.protocol.errors import FerryError
from quicferry.quic import hold
from quicferry.quic.herald import Outbox
from quicferry.quic.migratable import MigratableUDP
from quicferry.quic.move import Move
from quicferry.quic.served import ServedConnection

log = structlog.get_logger(__name__)

QuiesceHook = Callable[[str], Awaitable[None]]
"""The application's own: given the migration's id, returns once it is safe to dump."""
ResumeHook = Callable[[str, str], Awaitable[None]]
"""The application's own: given the migration's id and its outcome, ``moved`` or ``rolled_back``."""

FLUSH_TIME: Final = 0.5
"""Seconds the herald has to publish what waits before the hold."""
CLOSE_TIME: Final = 1.2
"""Seconds the herald has to disconnect."""
ARMED_TIME: Final = 20.0
"""Seconds an arming lasts beyond the request's limit for a phase."""
TOLD_AT_ONCE: Final = 8
"""Clients told of a move before the loop goes round once."""
REMEMBERED: Final = 64
"""Moves whose late acks and accounts are still understood, and whose ids are not armed again."""


class Serving(Protocol):
    """What a move needs of the server."""

    udp: MigratableUDP

    @property
    def clients(self) -> list[ServedConnection]: ...
    @property
    def strangers(self) -> list[ServedConnection]: ...


class Mover:
    """At most one move at a time."""

    def __init__(
        self,
        server: Serving,
        outbox: Outbox,
        *,
        migrate_to: Address | None,
        on_quiesce: QuiesceHook | None,
        on_resume: ResumeHook | None,
    ) -> None:
        self._server = server
        self._outbox = outbox
        self._migrate_to = migrate_to
        self._on_quiesce = on_quiesce
        self._on_resume = on_resume
        self._armed: ArmRequest | None = None
        self._disarm: asyncio.TimerHandle | None = None
        self._lapsed = False
        """The last arming ran out, and nobody called it off."""
        self._move: Move | None = None
        self._task: asyncio.Task[None] | None = None
        self._joined = asyncio.Event()
        self._past: dict[str, Move | None] = {}
        """The last moves by id, the oldest first; None for one that was called off before it began."""
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def names(self) -> set[str]:
        """Client names in use by the move under way."""
        return self._move.names if self._move is not None else set()

    # Arming and signals.

    def arm(self, request: ArmRequest) -> None:
        """Raises FerryError ``service_busy`` while another move is under way, ``too_late`` for one that is over.

        One that was called off is over, even if its arming comes only then: a request can be late.
        """
        if request.target is None:
            self._call_off(request.id)
            if request.id != ARE_YOU_THERE.id:
                self._remember(request.id, None)
            return
        if self._move is not None:
            if self._move.id != request.id:
                raise FerryError("service_busy", f"The server is moving already, as {self._move.id}.")
            return
        if request.id in self._past:
            raise FerryError("too_late", f"The move {request.id} is over here.")
        self._set_armed(request)
        log.info("armed", id=request.id, target=f"{request.target.host}:{request.target.port}")

    def begin(self) -> bool:
        """SIGTERM: whether it means a move."""
        if self._move is not None:
            log.info("sigterm_ignored", id=self._move.id, reason="the move is under way")
            return True
        if self._armed is not None and self._armed.target is not None:
            request, target = self._armed, self._armed.target
            self._set_armed(None)
            self._start(Move(request.id, target, request.epoch, request.options))
            return True
        if self._migrate_to is not None:
            self._start(Move(f"sigterm-{secrets.token_hex(6)}", self._migrate_to, 0, Options(), by_hand=True))
            return True
        if self._lapsed and hold.agent_waits(self._server.udp):
            log.warning("sigterm_ignored", reason="the arming has run out, but an agent waits for the socket still")
            return True
        return False

    def wake(self) -> None:
        """SIGUSR2 while serving: adopt a socket parked here, or bind a new one."""
        if self._move is not None and not self._move.by_hand:
            log.info("sigusr2_ignored", id=self._move.id, reason="the socket has not been given away")
            return
        if (adopted := hold.adopt(self._server.udp)) is not None:
            log.info("adopted_unasked", id=adopted.id, outcome=adopted.outcome)
            return
        try:
            self._server.udp.rebind()
        except OSError as error:
            log.error("rebind_failed", reason=str(error))
            return
        log.info("rebound", generation=self._server.udp.generation)

    async def stop(self) -> None:
        self._set_armed(None)
        for task in [task for task in (self._task, *self._background) if task is not None]:
            task.cancel()
            await asyncio.wait([task], timeout=CLOSE_TIME)

    # What clients tell.

    def joined(self, client: ServedConnection) -> None:
        """A client that says hello while a move is under way comes along."""
        self._joined.set()
        if self._move is not None and not self._move.held:
            self._move.tell(client)

    def gone(self, client: ServedConnection) -> None:
        for move in (self._move, *self._past.values()):
            if move is not None:
                move.gone(client)

    def acked(self, client: ServedConnection, ack: Ack) -> bool:
        move = self._known(ack.id)
        if move is None:
            return False
        after_ms = move.ack(client, ack)
        if after_ms is None:
            if ack.refused:
                log.warning("client_refused", id=move.id, client=client.name, reason=ack.refused)
            return False
        log.info("client_acked", id=move.id, client=client.name, after_ms=round(after_ms, 1))
        self._outbox.put(events.AckSeen(id=move.id, at_ms=_now_ms(), client=client.name, after_ms=round(after_ms, 3)))
        return True

    def ready(self, client: ServedConnection, ready: Ready) -> bool:
        if self._move is None or self._move.id != ready.id:
            return False
        return self._move.is_ready(client, ready)

    def moved(self, client: ServedConnection, moved: Moved) -> bool:
        move = self._known(moved.id)
        if move is None or not move.report(client, moved):
            return False
        log.info("client_arrived", id=move.id, client=client.name, by=moved.source, ms=moved.interruption_ms)
        self._outbox.put(
            events.ClientArrived(
                id=move.id,
                at_ms=_now_ms(),
                client=client.name,
                source=moved.source,
                interruption_ms=moved.interruption_ms,
            )
        )
        return True

    # The move itself.

    def _start(self, move: Move) -> None:
        self._move = move
        run = self._by_hand(move) if move.by_hand else self._run(move)
        self._task = asyncio.create_task(run, name=f"move-{move.id}")
        self._task.add_done_callback(_look_for_defects)

    async def _broadcast(self, move: Move) -> None:
        """Tell every client, and serve them in between: to tell hundreds takes longer than the pause."""
        for number, client in enumerate(self._server.clients, start=1):
            move.tell(client)
            if number % TOLD_AT_ONCE == 0:
                await asyncio.sleep(0)
        log.info("migrate_sent", id=move.id, clients=len(move.told))
        self._outbox.put(events.MigrateSent(id=move.id, at_ms=_now_ms(), clients=len(move.told)))

    async def _by_hand(self, move: Move) -> None:
        """The source document's way: tell the clients, gather acks, go on serving; somebody else dumps us."""
        await self._broadcast(move)
        await move.all_acked()
        log.info("acks_gathered", id=move.id, acks=len(move.acked), clients=len(move.names))
        self._end(move)

    async def _run(self, move: Move) -> None:
        try:
            await self._broadcast(move)
            await faults.at("server.told")
            await self._hear_newcomers()
            await asyncio.gather(move.all_acked(), move.all_ready(), self._quiesce(move))
            if why := move.refused_by_all:
                raise FerryError(
                    "hold_refused",
                    f"Every client refuses to go to {move.target.host}: {why}.",
                    hint="The target berth's address must be one that clients reach.",
                )
            await faults.at("server.quiesced")
            closed = self._close_those_left_behind(move)
            log.info("quiesced", id=move.id, acks=len(move.acked), clients=len(move.names), closed=closed)
            self._outbox.put(
                events.Quiesced(
                    id=move.id,
                    at_ms=_now_ms(),
                    acks=len(move.acked),
                    clients=len(move.names),
                    ready=len(move.ready),
                    closed=closed,
                )
            )
            await self._outbox.suspend(flush=FLUSH_TIME, close=CLOSE_TIME)
            self._close_those_left_behind(move)
            await faults.at("server.holding")
            move.held = True
            back = hold.hold(self._server.udp, move.id)
        except (FerryError, OSError) as error:  # OSError: no descriptor is left for the hold
            move.held = False
            code = error.code if isinstance(error, FerryError) else "hold_refused"
            log.error("move_called_off", id=move.id, code=code, reason=str(error))
            self._tell_rollback(move)
            self._spawn(self._outbox.resume())
            await self._resumed(move, "rolled_back")
            self._end(move)
            return
        faults.strike("server.adopted")
        # Serving again; the clients' queued datagrams are read already.
        if back.adopted.outcome == "rolled_back":
            self._tell_rollback(move)
        self._end(move)
        self._outbox.put(
            events.Adopted(
                id=move.id, at_ms=_now_ms(), outcome=back.adopted.outcome, still_ms=round(back.still_ms, 3)
            )
        )
        self._spawn(self._tell_adopted(move.id, back))
        await self._resumed(move, back.adopted.outcome)

    async def _tell_adopted(self, migration: str, back: hold.Back) -> None:
        await asyncio.sleep(quiet.ADOPTED)
        log.info(
            "adopted",
            id=migration,
            outcome=back.adopted.outcome,
            berth=back.adopted.berth,
            epoch=back.adopted.epoch,
            still_ms=round(back.still_ms, 1),
            queued=back.queued,
        )
        await self._outbox.resume()

    async def _hear_newcomers(self) -> None:
        """Who connected just now is given the time to say hello: it can come along then, and is not sent away."""
        while due := max((stranger.hello_due for stranger in self._server.strangers), default=0.0):
            self._joined.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due):
                    await self._joined.wait()

    async def _quiesce(self, move: Move) -> None:
        if self._on_quiesce is None:
            return
        try:
            async with asyncio.timeout(move.options.quiesce_timeout_ms / 1000):
                await self._on_quiesce(move.id)
        except TimeoutError:
            log.warning("application_not_quiet", id=move.id, after_ms=move.options.quiesce_timeout_ms)
        except Exception:  # an application's defect does not stop the move
            log.exception("on_quiesce_failed", id=move.id)

    async def _resumed(self, move: Move, outcome: str) -> None:
        if self._on_resume is None:
            return
        try:
            async with asyncio.timeout(move.options.quiesce_timeout_ms / 1000):
                await self._on_resume(move.id, outcome)
        except TimeoutError:
            log.warning("application_slow_to_resume", id=move.id)
        except Exception:  # an application's defect does not stop the server
            log.exception("on_resume_failed", id=move.id)

    def _close_those_left_behind(self, move: Move) -> int:
        """Say a clean goodbye to connections that will not come along: no hello, or refused by their policy."""
        left = self._server.strangers + [
            client for client in self._server.clients if client.name in move.refused and client.name in move.told
        ]
        left = [connection for connection in left if not connection.leaving]
        for connection in left:
            connection.say_goodbye("the server is moving; connect again")
        return len(left)

    def _call_off(self, migration: str) -> None:
        if self._armed is not None and self._armed.id == migration:
            self._set_armed(None)
            log.info("disarmed", id=migration)
        move = self._move
        if move is None or move.id != migration or move.held or self._task is None:
            return  # over, or given away: then only the agent can bring it back
        self._task.cancel()
        self._tell_rollback(move)
        self._end(move)
        self._spawn(self._outbox.resume())
        self._spawn(self._resumed(move, "rolled_back"))
        log.info("move_called_off", id=migration, code="cancelled", reason="disarmed")

    def _tell_rollback(self, move: Move) -> None:
        for client in list(move.told.values()):
            client.tell(move.rollback_line)

    def _end(self, move: Move) -> None:
        self._move = None
        self._remember(move.id, move)

    def _remember(self, migration: str, move: Move | None) -> None:
        self._past[migration] = move or self._past.get(migration)
        if len(self._past) > REMEMBERED:
            del self._past[next(iter(self._past))]

    def _known(self, migration: str) -> Move | None:
        if self._move is not None and self._move.id == migration:
            return self._move
        return self._past.get(migration)

    def _set_armed(self, request: ArmRequest | None) -> None:
        self._armed = request
        self._lapsed = False
        if self._disarm is not None:
            self._disarm.cancel()
            self._disarm = None
        if request is not None:
            # An arming nobody followed up must not turn a later `podman stop` into a move. Long after the
            # coordinator has called it off itself: a SIGTERM that finds us unarmed ends the server.
            self._disarm = asyncio.get_running_loop().call_later(
                ARMED_TIME + request.options.phase_timeout_ms / 1000, self._lapse, request.id
            )

    def _lapse(self, migration: str) -> None:
        self._call_off(migration)
        self._lapsed = True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _look_for_defects(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("move_failed", task=task.get_name(), exc_info=error)


def _now_ms() -> int:
    return round(time.time() * 1000)
