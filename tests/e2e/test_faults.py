"""The fault matrix: every fault at every named point of a move, and after each all that must always hold."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
import structlog
from msgspec import structs

from quicferry import faults
from quicferry.protocol import events as ev
from quicferry.protocol.api import MigrateRequest
from tests.faults.car import car
from tests.faults.checks import outcome, tidy
from tests.faults.deeds import stopped
from tests.faults.matrix import FAILS_AT, cases, points
from tests.faults.walk import Row, walk
from tests.faults.world import OPTIONS, World, world

DONE_AGAIN = 2
PATIENT = structs.replace(OPTIONS, phase_timeout_ms=20_000)
"""For moves that no limit is to end."""
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
        await broken_world.ask(MigrateRequest(service="echo", id=migration, options=PATIENT))
        ends.append(outcome(await broken_world.ended(migration)))
    assert ends == ["completed", "rolled_back: internal", "rolled_back: internal", "completed"]
    await broken_world.serves("echo")
    passed = {line for folder in folders for line in (folder / faults.PASSED).read_text().split()}
    known = {point for point in points() if not point.startswith("client.")}  # there is no client here
    assert passed - known <= NO_STEPS, "a point without faults"
    assert known <= passed, "nobody comes there"


async def test_a_server_that_parks_too_late_gets_its_socket_back_from_the_next_migration(broken_world: World) -> None:
    """It stood still right before it parked; its move was called off meanwhile, and the next one's agent listens."""
    home = broken_world.berths[broken_world.home("echo")]
    async with broken_world.client() as client:
        (broken_world.faults_in(home) / "server.holding").write_text("stop")
        await broken_world.ask(MigrateRequest(service="echo", id="first", options=PATIENT))
        pid = await stopped(lambda: home.server_pid)
        await broken_world.cancel("first")
        assert outcome(await broken_world.ended("first")) == "rolled_back: cancelled"
        await broken_world.ask(MigrateRequest(service="echo", id="second", options=OPTIONS))
        await broken_world.seen("second", ev.Prepared)
        os.kill(pid, signal.SIGCONT)
        assert outcome(await broken_world.ended("second")).startswith("rolled_back")
        assert await tidy(broken_world, "echo") == []
        await client.echoes(20)
        await broken_world.serves("echo")
        await broken_world.ask(MigrateRequest(service="echo", id="third", options=PATIENT))
        assert outcome(await broken_world.ended("third")) == "completed"
        await client.echoes(20)
        client.check()


async def test_a_client_that_stands_still_through_two_moves_finds_its_server(broken_world: World) -> None:
    """Each ``migrate`` and the first words of the target that it names lie in its socket, one behind the other."""
    await broken_world.add_berth("echo", with_server=False)
    placement = await broken_world.serves("echo")
    async with car(broken_world, placement.place.address, comes_back=True) as process:
        process.send_signal(signal.SIGSTOP)
        for berth in ("echo-b", "echo-c"):
            await broken_world.serves("echo")
            await broken_world.ask(MigrateRequest(service="echo", id=berth, to=berth, options=PATIENT))
            assert outcome(await broken_world.ended(berth)) == "completed"
        process.send_signal(signal.SIGCONT)


async def test_whatever_fails_wherever_the_session_and_one_copy_live(broken_world: World) -> None:
    """Of more than three hundred cases one or two may fail for the machine's sake, and must hold when done again."""
    rows: list[Row] = []
    try:
        await walk(broken_world, cases(), rows.append)
        lost = [case for case, row in zip(cases(), rows, strict=True) if not row.held]
        if lost and len(lost) <= DONE_AGAIN:
            for case, row in zip(lost, await walk(broken_world, lost, lambda _: None), strict=True):
                print(f"again: {case.shown} {case.fault}: {'held' if row.held else row.why}")
                rows[cases().index(case)] = row
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
