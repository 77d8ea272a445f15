"""CRIU's own statistics: decodes the stats-dump and stats-restore images.

Layout (CRIU's criu/include/magic.h, criu/image.c, criu/protobuf.c): two magic numbers, the length of the
message and the message, each number a little-endian u32.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
import structlog
from google.protobuf.message import DecodeError

from quicferry.host import criu_rpc_pb2 as rpc

T = TypeVar("T")
log = structlog.get_logger(__name__)

SERVICE_MAGIC: Final = 0x55105940
STATS_MAGIC: Final = 0x57093306
MAX_BYTES: Final = 64 * 1024
_HEAD: Final = struct.Struct("<III")


class DumpStats(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, pages in units of the page size."""

    freezing: float
    frozen: float
    """From the freeze to the thaw or kill: a withheld post-dump notification counts."""
    memdump: float
    memwrite: float
    pages_scanned: int
    pages_skipped: int
    """Unchanged since the parent image."""
    pages_written: int


class RestoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, pages in units of the page size."""

    forking: float
    restore: float
    """From reading the images to the point before the tasks run."""
    pages_restored: int


class StatsError(ValueError):
    """The bytes are no statistics image."""


def parse_dump(data: bytes) -> DumpStats:
    """Decode a stats-dump image. Raises StatsError."""
    entry = _parse(data)
    if not entry.HasField("dump"):
        raise StatsError("no dump statistics in it")
    dump = entry.dump
    return DumpStats(
        freezing=dump.freezing_time / 1e6,
        frozen=dump.frozen_time / 1e6,
        memdump=dump.memdump_time / 1e6,
        memwrite=dump.memwrite_time / 1e6,
        pages_scanned=dump.pages_scanned,
        pages_skipped=dump.pages_skipped_parent,
        pages_written=dump.pages_written,
    )


def parse_restore(data: bytes) -> RestoreStats:
    """Decode a stats-restore image. Raises StatsError."""
    entry = _parse(data)
    if not entry.HasField("restore"):
        raise StatsError("no restore statistics in it")
    restore = entry.restore
    return RestoreStats(
        forking=restore.forking_time / 1e6,
        restore=restore.restore_time / 1e6,
        pages_restored=restore.pages_restored,
    )


def read_dump(directory_fd: int) -> DumpStats | None:
    """The dump's statistics in a work directory; None while CRIU has not written them, or could not: a full disk."""
    data = _read(directory_fd, "stats-dump")
    return None if data is None else _or_none(parse_dump, data)


def read_restore(directory_fd: int) -> RestoreStats | None:
    """The restore's statistics in a work directory; None while CRIU has not written them, or could not."""
    data = _read(directory_fd, "stats-restore")
    return None if data is None else _or_none(parse_restore, data)


def _or_none(parse: Callable[[bytes], T], data: bytes) -> T | None:
    """Figures are no reason to fail a move that has worked."""
    try:
        return parse(data)
    except StatsError as error:
        log.warning("statistics_unreadable", error=str(error))
        return None


def _read(directory_fd: int, name: str) -> bytes | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(MAX_BYTES)


def _parse(data: bytes) -> rpc.stats_entry:
    if len(data) < _HEAD.size:
        raise StatsError(f"{len(data)} bytes are no statistics image")
    service, kind, size = _HEAD.unpack_from(data)
    if (service, kind) != (SERVICE_MAGIC, STATS_MAGIC):
        raise StatsError(f"wrong magic {service:#x} {kind:#x}")
    body = data[_HEAD.size : _HEAD.size + size]
    if len(body) != size:
        raise StatsError(f"{size} bytes announced, {len(body)} there")
    entry = rpc.stats_entry()
    try:
        entry.ParseFromString(body)
    except DecodeError as error:
        raise StatsError(str(error)) from None
    return entry
