"""One move as the server sees it: who was told, who acked, whose application is quiet."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from quicferry.protocol import control
from quicferry.protocol.api import Address, Options
from quicferry.protocol.control import Ack, Migrate, Moved, Ready


class Client(Protocol):
    """A connection that said hello."""

    name: str
    quiesces: bool

    def tell(self, line: bytes) -> bool:
        """Send a control line now; False if the control stream is gone."""


class Move:
    """Gathers acks and readiness; keyed by client name, which is unique among those connected."""

    def __init__(
        self, migration: str, target: Address, epoch: int, options: Options, *, by_hand: bool = False
    ) -> None:
        self.id = migration
        self.by_hand = by_hand
        """Nobody armed it: the socket stays with us and somebody else dumps the process."""
        self.target = target
        self.epoch = epoch
        self.options = options
        self.line = control.encode(
            Migrate(
                id=migration, addr=target.host, port=target.port, epoch=epoch, quiesce_ms=options.quiesce_timeout_ms
            )
        )
        self.rollback_line = control.encode(control.Rollback(id=migration))
        self.told: dict[str, Client] = {}
        """Those told and still connected."""
        self.names: set[str] = set()
        """Every name told, also of clients that have left."""
        self.acked: set[str] = set()
        self.refused: dict[str, str] = {}
        self.ready: set[str] = set()
        self.reported: set[tuple[str, str]] = set()
        self.held = False
        """The socket was given away for this move; it can't be called off here any more."""
        self._began = time.monotonic()
        self._all_acked = asyncio.Event()
        self._all_ready = asyncio.Event()

    def tell(self, client: Client) -> None:
        """Send ``migrate`` to a client, once."""
        if client.name not in self.names and client.tell(self.line):
            self.names.add(client.name)
            self.told[client.name] = client
            self._look()

    def ack(self, client: Client, ack: Ack) -> float | None:
        """Milliseconds from the broadcast to a client's first ack; None for a repetition, a refusal or a stranger."""
        if client.name not in self.told or client.name in self.acked or client.name in self.refused:
            return None
        if ack.refused:
            self.refused[client.name] = ack.refused[: control.MAX_REFUSAL]
        else:
            self.acked.add(client.name)
        self._look()
        return None if ack.refused else (time.monotonic() - self._began) * 1000

    def is_ready(self, client: Client, ready: Ready) -> bool:
        """Whether it was this client's first word of it."""
        if client.name not in self.told or client.name in self.ready:
            return False
        self.ready.add(client.name)
        self._look()
        return True

    def report(self, client: Client, moved: Moved) -> bool:
        """Whether this is the client's first account of its kind."""
        if client.name not in self.told or (client.name, moved.source) in self.reported:
            return False
        self.reported.add((client.name, moved.source))
        return True

    def gone(self, client: Client) -> None:
        """A connection ended; nobody waits for it any more."""
        if self.told.get(client.name) is client:
            del self.told[client.name]
            self._look()

    @property
    def refused_by_all(self) -> str:
        """Why the target's address can't be right, in a client's words: each of them refused it; otherwise empty."""
        reasons = [self.refused.get(name, "") for name in self.told]
        if not all(reason and not reason.startswith(control.OUTDATED) for reason in reasons):
            return ""
        return next(iter(reasons), "")

    async def all_acked(self) -> None:
        """Wait for every client's ack, ``ack_timeout_ms`` from now at most."""
        await self._until(self._all_acked, self.options.ack_timeout_ms)

    async def all_ready(self) -> None:
        """Wait for the clients that asked to be told, ``quiesce_timeout_ms`` from the broadcast at most."""
        await self._until(self._all_ready, self.options.quiesce_timeout_ms)

    async def _until(self, event: asyncio.Event, limit_ms: int) -> None:
        self._look()
        try:
            async with asyncio.timeout(limit_ms / 1000):
                await event.wait()
        except TimeoutError:
            return

    def _look(self) -> None:
        names = self.told.keys()
        if all(name in self.acked or name in self.refused for name in names):
            self._all_acked.set()
        else:
            self._all_acked.clear()
        if all(
            name in self.ready or name in self.refused or not client.quiesces for name, client in self.told.items()
        ):
            self._all_ready.set()
        else:
            self._all_ready.clear()
