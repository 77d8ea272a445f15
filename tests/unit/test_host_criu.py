"""The client of ``criu swrk``, against the other end of its socket: notifications, refusals, sudden ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from quicferry.host import criu_rpc_pb2 as rpc
from quicferry.host.criu import CriuSession
from quicferry.host.images import Images
from quicferry.protocol.errors import FerryError


class Criu:
    """CRIU's end of the socket, spoken by hand."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.setblocking(False)
        self.heard: list[rpc.criu_req] = []

    async def hear(self) -> rpc.criu_req:
        async with asyncio.timeout(5):
            data = await asyncio.get_running_loop().sock_recv(self.end, 65536)
        request = rpc.criu_req()
        request.ParseFromString(data)
        self.heard.append(request)
        return request

    def say(self, answer: rpc.criu_resp) -> None:
        self.end.send(answer.SerializeToString())

    async def notify(self, *scripts: str) -> list[bool]:
        """Announce each stage and hear its acknowledgement."""
        acknowledged = []
        for script in scripts:
            self.say(rpc.criu_resp(type=rpc.NOTIFY, success=True, notify=rpc.criu_notify(script=script)))
            acknowledged.append((await self.hear()).notify_success)
        return acknowledged

    def withhold(self, script: str) -> None:
        self.say(rpc.criu_resp(type=rpc.NOTIFY, success=True, notify=rpc.criu_notify(script=script)))


@pytest_asyncio.fixture
async def session(tmp_path: Path) -> AsyncIterator[CriuSession]:
    images = Images(tmp_path, "m1", "source")
    images.create()
    made = CriuSession(images)
    made.version = (4, 2, 1)
    yield made
    await made.close()


@pytest.fixture
def criu(session: CriuSession) -> Criu:
    return Criu(session._theirs)


async def test_a_dump_is_held_before_it_looks_at_the_process_and_after_it_is_done(
    session: CriuSession, criu: Criu
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(session.begin_dump(5000, timeout=5))
        request = await criu.hear()
        criu.withhold("pre-dump")
    assert session.withheld == "pre-dump"
    assert request.type == rpc.DUMP
    assert request.opts.pid == 5000
    assert request.opts.notify_scripts
    assert request.opts.manage_cgroups_mode == rpc.IGNORE
    assert request.opts.HasField("manage_cgroups_mode")
    assert request.opts.network_lock == rpc.SKIP
    assert request.opts.images_dir_fd == -1
    assert os.path.samefile(request.opts.images_dir, session._images_fd)  # noqa: ASYNC240 - a look
    assert not request.opts.HasField("parent_img")
    async with asyncio.TaskGroup() as group:
        group.create_task(session.dump(timeout=5))
        assert (await criu.hear()).notify_success
        assert await criu.notify("network-lock") == [True]
        criu.withhold("post-dump")
    assert session.withheld == "post-dump"
    async with asyncio.TaskGroup() as group:
        group.create_task(session.finish(True, timeout=5))
        assert (await criu.hear()).notify_success
        criu.say(rpc.criu_resp(type=rpc.DUMP, success=True))
    assert session.withheld == ""


async def test_a_refused_stage_is_no_error_of_ours(session: CriuSession, criu: Criu) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(session.begin_dump(5000, timeout=5))
        await criu.hear()
        criu.withhold("pre-dump")
    async with asyncio.TaskGroup() as group:
        group.create_task(session.finish(False, timeout=5))
        assert not (await criu.hear()).notify_success
        criu.say(rpc.criu_resp(type=rpc.DUMP, success=False))


async def test_a_failed_dump_says_what_criu_said(session: CriuSession, criu: Criu, tmp_path: Path) -> None:
    (tmp_path / "m1.source" / "dump.log").write_text("(00.1) Error (a.c:1): Connected TCP socket, consider\n")
    criu.say(rpc.criu_resp(type=rpc.DUMP, success=False, cr_errmsg="first words"))
    with pytest.raises(FerryError, match="first words") as caught:
        await session.begin_dump(5000, timeout=5)
    assert caught.value.code == "criu_failed"
    assert "Connected TCP socket" in caught.value.message
    assert "quiesce" in caught.value.hint


async def test_success_without_the_stage_waited_for_is_a_failure(session: CriuSession, criu: Criu) -> None:
    criu.say(rpc.criu_resp(type=rpc.DUMP, success=True))
    with pytest.raises(FerryError) as caught:
        await session.begin_dump(5000, timeout=5)
    assert caught.value.code == "criu_failed"


async def test_a_criu_that_ends_is_told(session: CriuSession, criu: Criu) -> None:
    criu.end.close()
    with pytest.raises(FerryError, match="ended early"):
        await session.begin_dump(5000, timeout=5)


async def test_a_criu_that_talks_nonsense_is_told(session: CriuSession, criu: Criu) -> None:
    criu.end.send(b"\xff\xff\xff")
    with pytest.raises(FerryError, match="can't be read"):
        await session.begin_dump(5000, timeout=5)


async def test_a_criu_that_says_nothing_is_not_waited_for(session: CriuSession) -> None:
    with pytest.raises(FerryError) as caught:
        await session.begin_dump(5000, timeout=0.05)
    assert caught.value.code == "phase_timeout"


async def test_pre_dump_needs_a_kernel_that_tracks_memory(session: CriuSession, criu: Criu) -> None:
    with pytest.raises(FerryError) as caught:
        await session.pre_dump(5000, 1, timeout=5)
    assert caught.value.code == "dirty_tracking_missing"
    session.tracks_memory = True
    for number in (1, 2):
        criu.say(rpc.criu_resp(type=rpc.PRE_DUMP, success=True))
        await session.pre_dump(5000, number, timeout=5)
    first, second = await criu.hear(), await criu.hear()
    assert first.opts.images_dir.endswith("/1")
    assert not first.opts.HasField("parent_img")
    assert (second.opts.parent_img, second.opts.track_mem) == ("../1", True)
    criu.withhold("pre-dump")
    await session.begin_dump(5000, rounds=2, timeout=5)
    last = await criu.hear()
    assert (last.opts.parent_img, last.opts.track_mem) == ("2", True)


async def test_a_restore_is_asked_for_ahead_and_stops_before_it_runs(tmp_path: Path) -> None:
    images = Images(tmp_path, "m1", "target")
    images.create()
    session = CriuSession(images, restores=True)
    session.version = (4, 2, 1)
    criu = Criu(session._theirs)
    await session.begin_restore({"pipe:[7]": 9})
    request = await criu.hear()
    assert request.type == rpc.RESTORE
    assert [(one.key, one.fd) for one in request.opts.inherit_fd] == [("pipe:[7]", 9)]
    inventory = os.open(images.path / "view" / "inventory.img", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(inventory, 100)
    criu.withhold("post-restore")
    # Nothing was restored here, so the count is wrong.
    with pytest.raises(FerryError, match="0 process trees"):
        await session.restore(b"what was dumped", timeout=5)
    assert [os.read(inventory, 100), os.read(inventory, 100)] == [b"what was dumped", b""]
    os.close(inventory)
    assert (await criu.hear()).notify_success, "CRIU has to be told to go on before anything else is looked at"
    assert (session.withheld, session.in_last_stage) == ("", True)
    criu.withhold("pre-resume")
    await session.stand_by(timeout=5)
    assert (session.withheld, session.in_last_stage) == ("pre-resume", False)
    await session.close()


async def test_a_restore_that_is_not_wanted_any_more_reads_the_end_of_file(tmp_path: Path) -> None:
    images = Images(tmp_path, "m1", "target")
    images.create()
    session = CriuSession(images, restores=True)
    inventory = os.open(images.path / "view" / "inventory.img", os.O_RDONLY | os.O_NONBLOCK)
    await session.close()
    assert os.read(inventory, 100) == b""
    os.close(inventory)


@pytest.mark.parametrize("restores", [True, False])
async def test_closing_twice_is_fine_and_leaves_no_descriptor(tmp_path: Path, restores: bool) -> None:
    images = Images(tmp_path, "m2", "target")
    images.create()
    before = os.listdir("/proc/self/fd")
    made = CriuSession(images, restores=restores)
    await made.close()
    await made.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
