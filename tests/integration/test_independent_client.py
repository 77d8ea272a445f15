"""A client that was written from docs/protocol.md alone keeps its session through a move."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.wrapper_kit import LIMIT, Agent, ServerProcess, Tls, make_tls, parked

SCRIPT = Path(__file__).parents[1] / "independent_client.py"


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return make_tls(tmp_path)


class Independent:
    """The script in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def until(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            while line := await self.process.stdout.readline():
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event:
                    return said
        pytest.fail(f"the client ended without {event}")


@contextlib.asynccontextmanager
async def independent(tls: Tls, port: int, *arguments: str) -> AsyncIterator[Independent]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(SCRIPT), "127.0.0.1", str(port), "--cafile", tls.certificate, *arguments),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Independent(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def test_it_imports_nothing_of_ours() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"aioquic"}


async def test_it_survives_moves(tls: Tls) -> None:
    async with (
        ServerProcess.start(tls) as server,
        independent(tls, server.port, "--moves", "2", "--count", "20") as client,
    ):
        await client.until("connected")
        with Agent(server.port) as agent:
            for number in (1, 2):
                target = parked()
                port = target.getsockname()[1]
                await server.arm(f"m{number}", port, epoch=number)
                server.signal(signal.SIGTERM)
                _, source = await agent.take()
                source.close()
                server.signal(signal.SIGUSR2)
                await agent.give(target, f"m{number}", "moved", epoch=number)
                assert (await client.until("target"))["id"] == f"m{number}"
        summary = await client.until("summary")
        assert (summary["moves"], summary["handshakes"]) == (2, 1)
        assert summary["sent"] == summary["echoed"] >= 20
        assert summary["peer"] == f"127.0.0.1:{port}"
        assert await client.process.wait() == 0
        assert [event["client"] for event in server.of("server.ack")] == ["independent"] * 2
        assert (await server.until("server.client", 2))[0]["source"] == "wrapper"


async def test_it_survives_a_rollback(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, independent(tls, server.port) as client:
        await client.until("connected")
        with Agent(server.port) as agent, parked() as target:
            await server.arm("m", target.getsockname()[1])
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            server.signal(signal.SIGUSR2)
            await agent.give(source, "m", "rolled_back")
            await client.until("rollback")
        client.process.send_signal(signal.SIGTERM)
        summary = await client.until("summary")
        assert summary["sent"] == summary["echoed"]
        assert (summary["moves"], summary["handshakes"], summary["peer"]) == (0, 1, f"127.0.0.1:{server.port}")


async def test_one_without_hello_gets_a_clean_close(tls: Tls) -> None:
    from tests.integration.test_wrappers import raw

    async with ServerProcess.start(tls) as server, raw(server.port) as stranger, asyncio.timeout(LIMIT):
        reader, writer = await stranger.create_stream()
        writer.write(b"hi")
        assert await reader.readexactly(2) == b"hi"
        with Agent(server.port) as agent, parked() as target:
            await server.arm("m", target.getsockname()[1])
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            await stranger.wait_closed()
            source.close()
        assert stranger.ended is not None
        assert stranger.ended.error_code == 0
        assert stranger.ended.frame_type is None  # of the application kind
        assert stranger.ended.reason_phrase == "the server is moving; connect again"
        assert server.of("server.quiesced")[0]["closed"] == 1
