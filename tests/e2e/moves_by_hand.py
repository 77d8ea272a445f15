"""Moves driven by a test itself, without NATS: both ends of one, and agents that die in the middle of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Final

import msgspec

from quicferry.host import criu, processes
from quicferry.host.podman import Podman
from quicferry.host.source import Source
from quicferry.host.target import Target
from quicferry.protocol import events
from quicferry.protocol.agents import AgentRequest
from tests.e2e.berths import PROJECT, Harbour, TestBerth, quick_options

_AGENT: Final = """
import asyncio, sys, msgspec
from pathlib import Path
from quicferry.host.podman import Podman
from quicferry.host.source import Source
from quicferry.host.target import Target
from quicferry.protocol import events
from quicferry.protocol.agents import AgentRequest

async def main():
    url, images, raw, upto = sys.argv[1:]
    request = msgspec.json.decode(raw, type=AgentRequest)
    podman = Podman(url)
    source, target = Source(podman, Path(images), request), Target(podman, Path(images), request)
    await source.prepare()
    await target.prepare()
    await source.hold()
    await source.dump()
    if upto == "asked":
        await target.images_complete()
    if upto == "restored":
        await target.restore()
        await target.stand_by()
    print("READY", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def a_move(here: TestBerth, there: TestBerth, number: int = 1, **more: int) -> AgentRequest:
    """What the coordinator would ask of the agents for the service's move ``number``."""
    return AgentRequest(
        id=f"move-{number}",
        service="echo",
        epoch=number,
        source=here.place,
        target=there.place,
        options=quick_options(),
        **more,
    )


class Ends:
    """Both ends of one migration, closed in the end whatever happens."""

    def __init__(self, port: Harbour, podman: Podman, here: TestBerth, there: TestBerth, *, epoch: int = 1) -> None:
        self.here, self.there = here, there
        self.request = a_move(here, there, epoch)
        self.source = Source(podman, port.images, self.request)
        self.target = Target(podman, port.images, self.request)

    async def __aenter__(self) -> Ends:
        await self.source.prepare()
        await self.target.prepare()
        return self

    async def resume(self) -> events.Resumed:
        """All of the target's last verb."""
        resumed = await self.target.resume()
        await self.target.leave()
        self.target.forget()
        return resumed

    async def move(self) -> events.Dumped:
        """Everything after prepare, in order."""
        await self.source.hold()
        dumped = await self.source.dump()
        await self.target.restore()
        await self.resume()
        await self.source.release()
        return dumped

    async def __aexit__(self, *_: object) -> None:
        await self.target.close()
        await self.source.close()


def occupant_pid(berth: TestBerth) -> int:
    server = processes.occupant(berth.init_pid)
    assert server is not None
    with server:
        return server.pid


async def die(port: Harbour, podman: Podman, request: AgentRequest, upto: str, *, settle: bool = True) -> None:
    """Run both ends in a process of its own up to ``upto``, then kill that with SIGKILL."""
    agent = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", _AGENT, port.url, str(port.images), msgspec.json.encode(request).decode(), upto),
        env={**os.environ, "PYTHONPATH": str(PROJECT / "shared")},
        stdout=asyncio.subprocess.PIPE,
    )
    assert agent.stdout is not None
    try:
        async with asyncio.timeout(30):
            while b"READY" not in (line := await agent.stdout.readline()):
                assert line, "the agent ended early"
    finally:
        agent.send_signal(signal.SIGKILL)
        await agent.wait()
    # CRIU ends by itself when it finds its client gone; only then are both copies let go.
    for place in (request.source, request.target) if settle else ():
        berth = await podman.berth(place.berth)
        await criu.outlive(berth.init_pid)
