"""The restore agent's verbs, carried out on one Target for each migration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from quicferry import quiet
from quicferry.bus.agent import Step
from quicferry.host.podman import Podman
from quicferry.host.target import Target
from quicferry.protocol.agents import AgentRequest
from quicferry.protocol.events import AnyEvent

Events = AsyncGenerator[AnyEvent, None]


class RestoreSteps:
    """What one restore agent has under way."""

    def __init__(self, podman: Podman, images: Path) -> None:
        self._podman = podman
        self._images = images
        self._targets: dict[str, Target] = {}

    def all(self) -> dict[str, Step]:
        return {"prepare": self.prepare, "restore": self.restore, "resume": self.resume, "abort": self.abort}

    async def prepare(self, request: AgentRequest) -> Events:
        target = Target(self._podman, self._images, request)
        try:
            yield await target.prepare()
        except BaseException:  # cancelled too: what prepare opened has no other owner yet
            await target.close()
            raise
        self._targets[request.id] = target

    async def restore(self, request: AgentRequest) -> Events:
        target = self._target(request)
        await target.images_complete()
        yield await target.restore()
        await target.stand_by()

    async def resume(self, request: AgentRequest) -> Events:
        target = self._target(request)
        self._targets[request.id] = target
        resumed = await target.resume()
        try:
            await asyncio.sleep(quiet.RESUMED)
            yield resumed
            await target.leave()
            await asyncio.sleep(quiet.IMAGES_DELETED)
        finally:
            # Whatever came of the rest, the target serves: a dock or images left behind would be nobody's.
            await target.close()
            target.forget()
            self._targets.pop(request.id, None)

    async def abort(self, request: AgentRequest) -> Events:
        yield await self._target(request).abort()
        self._targets.pop(request.id, None)

    async def check(self) -> None:
        """See that the host's processes are visible. Raises FerryError ``host_pid_namespace``, and Podman's."""
        await self._podman.visible_berths()

    async def close(self) -> None:
        """Let go of everything: what is restored and not resumed stands still, and can't send."""
        for target in self._targets.values():
            await target.close()
        self._targets.clear()

    def _target(self, request: AgentRequest) -> Target:
        # After a restart of the agent there is none: a fresh one can still resume and abort.
        return self._targets.get(request.id) or Target(self._podman, self._images, request)
