"""A client as a process of its own, which may be killed or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

from quicferry import faults
from quicferry.protocol.api import Address
from tests.e2e.berths import PROJECT
from tests.faults.parts import PATIENCE
from tests.faults.world import World


@contextlib.asynccontextmanager
async def car(world: World, address: Address, *, comes_back: bool) -> AsyncIterator[asyncio.subprocess.Process]:
    """The car client, connected, with its faults in the world's folder ``car``.

    If it ``comes_back``, it must have lost nothing when the block ends.
    """
    folder = world.folder / "car"
    folder.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.car_client", "--json", "--cafile", str(world.tls / "cert.pem")),
        *("--name", "car", "--interval-ms", "20"),
        cwd=PROJECT,
        env={
            **os.environ,
            "PYTHONPATH": f"{PROJECT}:{PROJECT}/shared",
            "TARGET_ADDR": f"{address.host}:{address.port}",
            "TRANSPARENT": "1",
            "QUICFERRY_LOG_LEVEL": "error",
            faults.VARIABLE: str(folder),
        },
        stdout=asyncio.subprocess.PIPE,
    )
    reading: asyncio.Task[None] | None = None
    said: list[dict[str, Any]] = []
    news = asyncio.Event()
    try:
        reading = asyncio.create_task(_read(process, said, news))
        await _until(said, news, "connected")
        yield process
        if comes_back:
            await _until(said, news, "move")
            process.send_signal(signal.SIGINT)
            await _until(said, news, "summary")
            summary = said[-1]
            assert summary["handshakes"] == 1, f"the stopped client shook hands {summary['handshakes']} times"
            assert summary["echoes_lost"] == 0, f"the stopped client lost {summary['echoes_lost']} echoes"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if reading is not None:
            await reading


async def _read(process: asyncio.subprocess.Process, said: list[dict[str, Any]], news: asyncio.Event) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        said.append(json.loads(line))
        news.set()


async def _until(said: list[dict[str, Any]], news: asyncio.Event, event: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while not any(line["event"] == event for line in said):
            news.clear()
            await news.wait()
