"""What the README shows of the library works as it stands there."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from pathlib import Path

import quicferry
from tests.integration.test_wrappers_app import free_port
from tests.readme import python_blocks


async def test_the_server_and_the_client_of_the_readme_talk(tmp_path: Path) -> None:
    _, server, client = python_blocks()
    port = free_port()
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    quicferry.ensure_certificate(str(certificate), str(key), [])
    environment = {"PYTHONUNBUFFERED": "1"} | {
        name: value for name, value in os.environ.items() if name not in ("NATS_URL", "QUICFERRY_SERVICE")
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", server.replace("4242", str(port))),
        cwd=tmp_path,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while b"serving" not in await process.stdout.readline():
                assert process.returncode is None
        shown = (
            client.replace("192.0.2.7", "127.0.0.1").replace("4242", str(port)).replace("ca.pem", str(certificate))
        )
        talk = "        writer.write(b'over')\n        writer.write_eof()\n        return await reader.read()\n"
        scope: dict[str, object] = {"quicferry": quicferry}
        source = "async def dial():\n" + textwrap.indent(shown, "    ") + talk
        exec(compile(source, "README.md", "exec"), scope)  # noqa: S102 - it is our own page
        async with asyncio.timeout(20):
            assert await scope["dial"]() == b"over"  # type: ignore[operator]
    finally:
        process.terminate()
        told, _ = await process.communicate()
    assert process.returncode == 0, told.decode()
