"""CRIU by its command line, one process a step, as somebody at a shell would move a server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from quicferry.host import criu_stats
from quicferry.host.processes import SERVER_PID
from quicferry.protocol.errors import FerryError

CRIU_SECONDS: Final = 30.0
NEEDED: Final = ("--manage-cgroups=ignore",)
"""Without it CRIU moves the restored task into the dumped one's cgroup."""
QUICK: Final = (*NEEDED, "--network-lock", "skip", "--file-validation", "filesize")
"""What the agents ask for too."""


class Times(NamedTuple):
    """CRIU's own, in milliseconds."""

    frozen_ms: float
    restore_ms: float


async def dump(init_pid: int, images: int, options: Sequence[str] = NEEDED) -> None:
    """Dump the server of the berth whose PID 1 that is, into the folder ``images``, and kill it.

    Raises FerryError ``criu_failed``.
    """
    await _criu(init_pid, images, "dump", "-t", str(SERVER_PID), *options)


async def restore(init_pid: int, images: int, options: Sequence[str] = NEEDED) -> None:
    """Restore it in another berth, detached. Raises FerryError ``criu_failed``."""
    for name in os.listdir(images):
        if name.startswith("timens-"):  # a time namespace would hide the pause from the server's clock
            os.unlink(name, dir_fd=images)
    await _criu(init_pid, images, "restore", "--restore-detached", *options)


def times(images: int) -> Times:
    """Of the dump and the restore made there. Raises FerryError ``criu_failed`` if CRIU left none."""
    dumped, restored = criu_stats.read_dump(images), criu_stats.read_restore(images)
    if dumped is None or restored is None:
        raise FerryError("criu_failed", "CRIU left no statistics.")
    return Times(round(dumped.frozen * 1000, 3), round(restored.restore * 1000, 3))


def empty(images: int) -> None:
    """Forget what the last move left."""
    for name in os.listdir(images):
        os.unlink(name, dir_fd=images)


def size_bytes(images: int) -> int:
    return sum(os.stat(name, dir_fd=images).st_size for name in os.listdir(images))


async def _criu(init_pid: int, images: int, verb: str, *options: str) -> None:
    command = ["nsenter", "-t", str(init_pid), "-m", "-u", "-i", "-n", "-p", "--", "criu", verb]
    command += ["-D", f"/proc/self/fd/{images}", "-o", f"{verb}.log", *options]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(images,),
    )
    try:
        async with asyncio.timeout(CRIU_SECONDS):
            code = await process.wait()
    except TimeoutError:
        raise FerryError("criu_failed", f"criu {verb} did not end within {CRIU_SECONDS:g} s.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        raise FerryError("criu_failed", f"criu {verb} ended with {code}: {_said(images, f'{verb}.log')}")


def _said(images: int, name: str) -> str:
    try:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=images), errors="replace") as file:
            return " | ".join(line.strip() for line in file if "Error" in line)[-600:] or "its log tells nothing"
    except OSError:
        return "it left no log"
