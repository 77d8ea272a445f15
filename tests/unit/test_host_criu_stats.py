"""CRIU's statistics images: decoded, and anything else refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quicferry.host import criu_rpc_pb2 as rpc
from quicferry.host import criu_stats

# As CRIU 4.2.1 wrote them; the notification after the dump was withheld through the restore.
WRITTEN_DUMP = "4059105506330957240000000a22086010cfe50118863020b42528cb15300038e6144000480050085808600068007000"
WRITTEN_RESTORE = "40591055063309570e000000120c08001000180120e16028e614"
HEAD = struct.pack("<II", criu_stats.SERVICE_MAGIC, criu_stats.STATS_MAGIC)


def image(entry: rpc.stats_entry) -> bytes:
    body = entry.SerializeToString()
    return HEAD + struct.pack("<I", len(body)) + body


def a_dump() -> rpc.stats_entry:
    return rpc.stats_entry(
        dump=rpc.dump_stats_entry(
            freezing_time=150,
            frozen_time=11_850,
            memdump_time=3_000,
            memwrite_time=2_000,
            pages_scanned=5_000,
            pages_skipped_parent=7,
            pages_written=2_663,
            pages_lazy=0,
        )
    )


def a_restore() -> rpc.stats_entry:
    return rpc.stats_entry(
        restore=rpc.restore_stats_entry(
            pages_compared=0, pages_skipped_cow=0, forking_time=1_000, restore_time=11_219, pages_restored=2_663
        )
    )


def test_a_dump_is_in_seconds_and_pages() -> None:
    stats = criu_stats.parse_dump(image(a_dump()))
    assert (stats.freezing, stats.frozen, stats.memdump, stats.memwrite) == (0.00015, 0.01185, 0.003, 0.002)
    assert (stats.pages_scanned, stats.pages_skipped, stats.pages_written) == (5_000, 7, 2_663)


def test_a_restore_is_in_seconds_and_pages() -> None:
    stats = criu_stats.parse_restore(image(a_restore()))
    assert (stats.forking, stats.restore, stats.pages_restored) == (0.001, 0.011219, 2_663)


def test_the_bytes_that_criu_wrote_are_read() -> None:
    dump = criu_stats.parse_dump(bytes.fromhex(WRITTEN_DUMP))
    assert (dump.pages_written, dump.freezing, dump.frozen) == (2_662, 0.000096, 0.029391)
    restore = criu_stats.parse_restore(bytes.fromhex(WRITTEN_RESTORE))
    assert (restore.pages_restored, restore.restore) == (2_662, 0.012385)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEAD,
        HEAD + struct.pack("<I", 100) + b"short",
        struct.pack("<III", criu_stats.STATS_MAGIC, criu_stats.SERVICE_MAGIC, 0),
        HEAD + struct.pack("<I", 3) + b"\xff\xff\xff",
        image(a_restore()),
    ],
)
def test_what_is_no_dump_is_refused(data: bytes) -> None:
    with pytest.raises(criu_stats.StatsError):
        criu_stats.parse_dump(data)


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_do_harm(data: bytes, framed: bool) -> None:
    whole = HEAD + struct.pack("<I", len(data)) + data if framed else data
    for parse in (criu_stats.parse_dump, criu_stats.parse_restore):
        try:
            parse(whole)
        except criu_stats.StatsError:
            continue


def test_statistics_that_are_not_there_yet_are_none(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert criu_stats.read_dump(folder) is None
        (tmp_path / "stats-dump").write_bytes(image(a_dump()))
        (tmp_path / "stats-restore").write_bytes(image(a_restore()))
        read = criu_stats.read_dump(folder)
        assert read is not None
        assert read.pages_written == 2_663
        assert criu_stats.read_restore(folder) is not None
        for name in ("stats-dump", "stats-restore"):  # as a full disk leaves them
            (tmp_path / name).write_bytes(b"")
        assert criu_stats.read_dump(folder) is None
        assert criu_stats.read_restore(folder) is None
    finally:
        os.close(folder)
