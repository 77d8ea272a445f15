"""Sends back whatever a stream brings, until it ends."""

from __future__ import annotations

import asyncio
import os
import sys

import quicferry
import quicferry.logging

CHUNK = 65_536


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One stream."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()


def settings() -> tuple[str, str, str, int]:
    """Certificate, key, host and port from the environment. Raises FerryError ``bad_settings``."""
    certificate = os.environ.get("QUICFERRY_CERT", "cert.pem")
    private_key = os.environ.get("QUICFERRY_KEY", "key.pem")
    port = os.environ.get("QUICFERRY_PORT", "4242")
    if not port.isdecimal() or not 0 < int(port) < 65_536:
        raise quicferry.FerryError("bad_settings", f"QUICFERRY_PORT={port!r} is not a port.", hint="1 to 65535.")
    names = os.environ.get("QUICFERRY_SAN", "").replace(",", " ").split()
    quicferry.ensure_certificate(certificate, private_key, names)
    return certificate, private_key, os.environ.get("QUICFERRY_HOST", "0.0.0.0"), int(port)  # noqa: S104


def main() -> int:
    quicferry.logging.configure("echo-server")
    try:
        certificate, private_key, host, port = settings()
        asyncio.run(quicferry.serve(echo, certificate=certificate, private_key=private_key, host=host, port=port))
    except quicferry.FerryError as error:
        print(f"echo-server: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
