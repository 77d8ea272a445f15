"""``python -m quicferry.bench.server``: the echo server that is measured where the system's own is not.

QUICFERRY_BALLAST_MB: resident memory to hold beside the server's own, each page different. QUICFERRY_QUIET: standard
output and error go to the berth's own /dev/null, so that CRIU's command line can restore them.
QUICFERRY_PORT: as for the echo server.
"""

from __future__ import annotations

import asyncio
import os
import sys

import quicferry
import quicferry.logging

PAGE = 4096
CHUNK = 65_536


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One stream, as services/echo_server does it."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()


def ballast(megabytes: int) -> bytearray:
    """So much memory, touched; no two pages are alike and none is zero, so none is left out of a dump."""
    block = bytearray(megabytes * 1024 * 1024)
    for start in range(0, len(block), PAGE):
        block[start : start + 8] = (start + 1).to_bytes(8, "little")
    return block


def main() -> int:
    if os.environ.get("QUICFERRY_QUIET"):
        null = os.open("/dev/null", os.O_WRONLY)
        for number in (1, 2):
            os.dup2(null, number)
        os.close(null)
    quicferry.logging.configure("bench-server")
    weight = ballast(int(os.environ.get("QUICFERRY_BALLAST_MB") or 0))
    certificate, key = os.environ["QUICFERRY_CERT"], os.environ["QUICFERRY_KEY"]
    port = int(os.environ.get("QUICFERRY_PORT") or 4242)
    quicferry.ensure_certificate(certificate, key, [])
    asyncio.run(quicferry.serve(echo, certificate=certificate, private_key=key, port=port))
    del weight
    return 0


if __name__ == "__main__":
    sys.exit(main())
