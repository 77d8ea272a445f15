"""Moves of a service of the benchmark's own, in two berths that the running system's agents know."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from quicferry.bench.ferry import Ferry
from quicferry.bench.stand import SERVER, Stand
from quicferry.bus.connection import Bus
from quicferry.bus.registry import Registry
from quicferry.protocol.errors import FerryError


class OwnService(Ferry):
    """The service ``bench-KIND``, from :meth:`open` to :meth:`close`, its berths with that environment."""

    def __init__(self, bus: Bus, cafile: str, stand: Stand, kind: str, environment: Mapping[str, str]) -> None:
        super().__init__(bus, cafile, f"bench-{kind}")
        self._stand = stand
        self._environment = environment
        self._berths = (f"{kind}-a", f"{kind}-b")

    async def open(self) -> None:
        for name, command in zip(self._berths, (SERVER, ()), strict=True):
            await self._stand.berth(name, command, service=self._service, environment=self._environment)

    async def close(self) -> None:
        """Safe to repeat, and when :meth:`open` failed half-way."""
        await self._stand.remove(*(self._stand.box(name) for name in self._berths))
        with contextlib.suppress(FerryError):  # a NATS that is gone has forgotten it anyway
            await (await Registry.open(self._bus)).forget(self._service)


class Copied(OwnService):
    """``copied``: what the shared heap alone gives is the difference to ``ferry``."""

    name = "copied"
    what = "ferry with QUICFERRY_HEAP=private: all memory is dumped and read back"

    def __init__(self, bus: Bus, cafile: str, stand: Stand) -> None:
        super().__init__(bus, cafile, stand, "copied", {"QUICFERRY_HEAP": "private"})
