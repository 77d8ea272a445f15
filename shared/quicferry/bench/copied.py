"""``copied``: ferry without the shared heap, so that CRIU copies all memory out and in: what the heap alone gives."""

from __future__ import annotations

import contextlib
from typing import Final

from quicferry.bench.ferry import Ferry
from quicferry.bench.stand import SERVER, Stand
from quicferry.bus.connection import Bus
from quicferry.bus.registry import Registry
from quicferry.protocol.errors import FerryError

SERVICE: Final = "bench-copied"


class Copied(Ferry):
    """Moves of a service of its own, in two berths of the running system."""

    name = "copied"
    what = "ferry with QUICFERRY_HEAP=private: all memory is dumped and read back"

    def __init__(self, bus: Bus, cafile: str, stand: Stand) -> None:
        super().__init__(bus, cafile, SERVICE)
        self._stand = stand

    async def open(self) -> None:
        private = {"QUICFERRY_HEAP": "private"}
        await self._stand.berth("copied-a", SERVER, service=SERVICE, environment=private)
        await self._stand.berth("copied-b", service=SERVICE, environment=private)

    async def close(self) -> None:
        await self._stand.remove(self._stand.box("copied-a"), self._stand.box("copied-b"))
        with contextlib.suppress(FerryError):  # a NATS that is gone has forgotten it anyway
            await (await Registry.open(self._bus)).forget(SERVICE)
