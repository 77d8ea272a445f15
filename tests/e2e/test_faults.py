"""The fault matrix: every fault at every named point of a move, and after each all that must always hold."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
import structlog

from quicferry import faults
from quicferry.protocol.api import MigrateRequest
from tests.faults.checks import outcome
from tests.faults.matrix import FAILS_AT, cases, points
from tests.faults.walk import Row, walk
from tests.faults.world import OPTIONS, World, world

NO_STEPS = {"asked.quicferry.services", "answer.quicferry.services", "coordinator.write.decision.failed"}
"""Passed, and no part of a move."""


@pytest_asyncio.fixture
async def broken_world(tmp_path: Path) -> AsyncIterator[World]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # the client's
    async with world(tmp_path) as made:
        yield made


async def test_every_point_that_is_passed_is_in_the_matrix_and_the_other_way_round(broken_world: World) -> None:
    folders = [broken_world.planted, *(broken_world.faults_in(berth) for berth in broken_world.berths.values())]
    for folder in folders:
        (folder / faults.PASSED).touch()
    ends = []
    for number, fails_at in enumerate(["", *FAILS_AT.values(), ""]):
        await broken_world.serves("echo")
        if fails_at:
            (broken_world.planted / fails_at).write_text("error")
        migration = f"passing-{number}"
        await broken_world.ask(MigrateRequest(service="echo", id=migration, options=OPTIONS))
        ends.append(outcome(await broken_world.ended(migration)))
    assert ends == ["completed", "rolled_back: internal", "rolled_back: internal", "completed"]
    await broken_world.serves("echo")
    passed = {line for folder in folders for line in (folder / faults.PASSED).read_text().split()}
    known = {point for point in points() if not point.startswith("client.")}  # there is no client here
    assert passed - known <= NO_STEPS, "a point without faults"
    assert known <= passed, "nobody comes there"


async def test_whatever_fails_wherever_the_session_and_one_copy_live(broken_world: World) -> None:
    rows: list[Row] = []
    try:
        await walk(broken_world, cases(), rows.append)
    finally:
        with contextlib.suppress(OSError):
            broken = [row for row in rows if not row.held]
            for row in broken:
                print(f"{row.point} {row.fault}: {row.outcome}: {row.why}")
            if broken:
                for log in sorted(broken_world.folder.glob("*.log")):
                    print(f"--- {log.name}\n{log.read_text()[-20_000:]}")
    assert [f"{row.point} {row.fault}: {row.why}" for row in rows if not row.held] == []
    assert len(rows) == len(cases())
