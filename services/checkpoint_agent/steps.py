"""The checkpoint agent's verbs, carried out on one Source for each migration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import structlog

from quicferry import quiet
from quicferry.bus.agent import Step
from quicferry.host.podman import Podman
from quicferry.host.source import Source
from quicferry.protocol.agents import AgentRequest
from quicferry.protocol.api import Berth
from quicferry.protocol.errors import FerryError
from quicferry.protocol.events import AnyEvent

log = structlog.get_logger(__name__)

Events = AsyncGenerator[AnyEvent, None]


class CheckpointSteps:
    """What one checkpoint agent has under way."""

    def __init__(self, podman: Podman, images: Path, node: str) -> None:
        self._podman = podman
        self._images = images
        self._node = node
        self._sources: dict[str, Source] = {}

    def all(self) -> dict[str, Step]:
        return {
            "prepare": self.prepare,
            "pre_dump": self.pre_dump,
            "dump": self.dump,
            "release": self.release,
            "abort": self.abort,
        }

    async def prepare(self, request: AgentRequest) -> Events:
        source = Source(self._podman, self._images, request)
        try:
            yield await source.prepare()
        except BaseException:  # cancelled too: what prepare opened has no other owner yet
            await source.close()
            raise
        self._sources[request.id] = source

    async def pre_dump(self, request: AgentRequest) -> Events:
        yield await self._source(request).pre_dump(request.round)

    async def dump(self, request: AgentRequest) -> Events:
        source = self._source(request)
        held = await source.hold()
        await source.dump_done(quiet.HELD_WITHIN)
        yield held
        yield await source.dump()

    async def release(self, request: AgentRequest) -> Events:
        await asyncio.sleep(quiet.SOURCE_KILLED)
        yield await self._source(request).release()
        self._sources.pop(request.id, None)

    async def abort(self, request: AgentRequest) -> Events:
        yield await self._source(request).abort()
        self._sources.pop(request.id, None)

    async def berths(self) -> list[Berth]:
        """The node's berths. Raises FerryError ``podman_unreachable``, ``host_pid_namespace``."""
        found: list[Berth] = []
        for facts in await self._podman.visible_berths():
            with contextlib.suppress(FerryError):  # it has ended meanwhile
                found.append(facts.record(self._node))
        return found

    async def close(self) -> None:
        """Let go of everything: what can't be committed yet is thawed and served on, the rest stays mute."""
        for migration, source in self._sources.items():
            try:
                await source.shut_down()
            except (FerryError, OSError) as error:  # the others are to be served on all the same
                log.error("source_not_given_back", id=migration, reason=str(error))
        self._sources.clear()

    def _source(self, request: AgentRequest) -> Source:
        # After a restart of the agent there is none: a fresh one can still release and abort.
        return self._sources.get(request.id) or Source(self._podman, self._images, request)
