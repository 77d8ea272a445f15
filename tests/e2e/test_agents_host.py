"""The host layer on real containers: a UDP echo moved, thawed, cleared away, and orphaned by its agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quicferry.host import processes, source
from quicferry.host.parking import bind_parked
from quicferry.host.podman import Podman
from quicferry.host.source import Source
from quicferry.host.target import WOKEN, Target
from quicferry.protocol.errors import FerryError
from tests.e2e.berths import (
    ECHO,
    PORT,
    EchoClient,
    Harbour,
    sockets_of,
)
from tests.e2e.berths import podman as podman_command
from tests.e2e.moves_by_hand import Ends, die, occupant_pid

pytestmark = pytest.mark.e2e


def images_left(port: Harbour) -> list[str]:
    return os.listdir(port.images)


async def test_a_server_moves_there_and_back_with_what_was_sent_to_it(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        assert await client.ask(here, "first") == 1
        answered = 1
        for epoch in range(1, 4):
            async with Ends(port, podman, here, there, epoch=epoch) as ends:
                await ends.source.hold()
                dumped = await ends.source.dump()
                for text in ("one", "two", "three"):
                    client.send(there, text)
                await ends.target.restore()
                resumed, _ = await asyncio.gather(ends.resume(), ends.source.release())
            assert [await client.answer() for _ in range(3)] == [
                (answered + n, processes.SERVER_PID, text, there.ip)
                for n, text in enumerate(("one", "two", "three"), start=1)
            ]
            answered += 3
            # What it prints reaches the log of the berth it is in now.
            await port.log_line(there, f"adopted moved {there.name} {epoch}")
            assert set(dumped.pipes) == {"1", "2"}
            assert dumped.pages > 0
            assert dumped.image_bytes > dumped.pages * os.sysconf("SC_PAGE_SIZE")
            assert resumed.queued > 0
            assert processes.occupant(here.init_pid) is None
            assert images_left(port) == []
            pid = occupant_pid(there)
            for same in ("cgroup", "ns/time", "ns/net", "ns/mnt", "ns/pid"):
                assert _of(pid, same) == _of(there.init_pid, same), same
            here, there = there, here
        assert await client.ask(here, "last") == answered + 1


async def test_abort_after_the_dump_brings_the_source_back_with_its_queue(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        assert await client.ask(here, "before") == 1
        async with Ends(port, podman, here, there) as ends:
            await ends.source.hold()
            await ends.source.dump()
            for text in ("one", "two"):
                client.send(here, text)
            await ends.source.abort()
            await ends.target.abort()
        assert [(await client.answer())[::2] for _ in range(2)] == [(2, "one"), (3, "two")]
        await port.log_line(here, f"adopted rolled_back {here.name} 0")
        assert images_left(port) == []
        # Aborted is as good as new: the next move works.
        async with Ends(port, podman, here, there, epoch=2) as ends:
            await ends.source.hold()
            await ends.source.dump()
            await ends.target.restore()
            await ends.target.stand_by()
            await asyncio.gather(ends.resume(), ends.source.release())
        assert await client.ask(there, "after") == 4


async def test_abort_of_a_restored_target_leaves_no_process(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        await ends.source.hold()
        await ends.source.dump()
        await ends.target.restore()
        assert processes.berth_pid_taken(there.init_pid, processes.SERVER_PID)
        await ends.target.abort()
        assert not processes.berth_pid_taken(there.init_pid, processes.SERVER_PID)
        bind_parked(there.init_pid, PORT).close()  # would raise port_taken
        await ends.source.abort()
    with EchoClient() as client:
        assert await client.ask(here, "still here") == 1
    assert images_left(port) == []


async def test_abort_works_at_every_stage_and_twice(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        for stage in range(3):
            async with Ends(port, podman, here, there, epoch=stage + 1) as ends:
                for step in (ends.source.hold, ends.source.dump)[:stage]:
                    await step()
                for _ in range(2):
                    await ends.target.abort()
                    await ends.source.abort()
            assert await client.ask(here, f"stage {stage}") == stage + 1


async def test_a_dump_cancelled_midway_can_be_aborted(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO, env={"ECHO_BALLAST_MIB": "64"}), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        await ends.source.hold()
        dumping = asyncio.create_task(ends.source.dump())
        # Cancelled once CRIU has begun to write, well before it has written 64 MiB.
        while not any(port.images.glob("*/pages-*.img")):  # noqa: ASYNC110 - a file says how far CRIU is
            await asyncio.sleep(0)
        dumping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dumping
        await ends.source.abort()
        await ends.target.abort()
    with EchoClient() as client:
        assert await client.ask(here, "still here") == 1


@pytest.mark.parametrize("upto", ["dumped", "asked"])
async def test_a_killed_agent_leaves_the_source_mute_until_the_next_takes_over(
    port: Harbour, podman: Podman, upto: str
) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    ends = Ends(port, podman, here, there)
    # The latter with a CRIU at the target that waits for its inventory: it ends by itself, or `die` fails.
    await die(port, podman, ends.request, upto)
    pid = occupant_pid(here)
    with processes.Process(pid) as server:
        # Thawed by its tracer's death, whoever was first: alive, standing still, and without any IP socket.
        assert server.alive
        assert processes.is_held(pid)
        assert sockets_of(pid) == []
    with EchoClient() as client:
        client.udp.connect((here.ip, PORT))
        client.udp.send(b"anybody?")
        # The berth's kernel answers that nobody listens, which no server that could send would let it do.
        with pytest.raises(ConnectionRefusedError):
            await client.answer()
    try:
        await ends.source.abort()
        await ends.target.abort()
    finally:
        await ends.target.close()
        await ends.source.close()
    with EchoClient() as client:
        assert await client.ask(here, "back") == 1
    assert images_left(port) == []


async def test_a_killed_agent_leaves_both_copies_mute_and_either_can_go_on(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    for epoch, forward in ((1, False), (2, True)):
        ends = Ends(port, podman, here, there, epoch=epoch)
        await die(port, podman, ends.request, "restored")
        for berth in (here, there):
            pid = occupant_pid(berth)
            assert processes.is_held(pid)
            assert sockets_of(pid) == []
        try:
            if forward:
                await ends.resume()
                await ends.source.release()
            else:
                await ends.target.abort()
                await ends.source.abort()
        finally:
            await ends.target.close()
            await ends.source.close()
        lives, empty = (there, here) if forward else (here, there)
        with EchoClient() as client:
            assert await client.ask(lives, "here") == epoch
        assert processes.occupant(empty.init_pid) is None
        assert images_left(port) == []


@pytest.mark.parametrize("forward", [False, True])
async def test_the_next_agent_waits_for_the_dead_ones_criu(port: Harbour, podman: Podman, forward: bool) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    ends = Ends(port, podman, here, there)
    await die(port, podman, ends.request, "restored", settle=False)
    try:
        if forward:
            await asyncio.gather(ends.resume(), ends.source.release())
        else:
            await asyncio.gather(ends.target.abort(), ends.source.abort())
    finally:
        await ends.target.close()
        await ends.source.close()
    lives, empty = (there, here) if forward else (here, there)
    with EchoClient() as client:
        assert await client.ask(lives, "here") == 1
    assert processes.occupant(empty.init_pid) is None


@contextlib.asynccontextmanager
async def orphaned(port: Harbour, podman: Podman, *, copy_dies: bool) -> AsyncIterator[Ends]:
    """A move whose agents were killed once the copy was restored, and perhaps the copy too: others go on."""
    here, there = await port.berth("a", ECHO), await port.berth("b")
    ends = Ends(port, podman, here, there)
    await die(port, podman, ends.request, "restored")
    if copy_dies:
        with processes.Process(occupant_pid(there)) as copy:
            assert await copy.kill()
    try:
        yield ends
    finally:
        await ends.target.close()
        await ends.source.close()


async def test_a_target_whose_restored_process_is_gone_is_restored_again(port: Harbour, podman: Podman) -> None:
    async with orphaned(port, podman, copy_dies=True) as ends:
        await ends.resume()
        await ends.source.release()
        with EchoClient() as client:
            assert await client.ask(ends.there, "from the images") == 1


async def test_a_second_restore_that_fails_is_not_in_the_way_of_the_third(
    port: Harbour, podman: Podman, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: bool) -> bytes:
        raise FerryError("machine_unfit", "No room.")

    async with orphaned(port, podman, copy_dies=True) as ends:
        with monkeypatch.context() as patched:
            patched.setattr(ends.target._images, "fill_view", full)
            with pytest.raises(FerryError) as caught:
                await ends.resume()
        assert caught.value.code == "machine_unfit"
        await ends.resume()
        await ends.source.release()
        with EchoClient() as client:
            assert await client.ask(ends.there, "at the third") == 1


async def test_a_copy_that_may_have_changed_its_heap_is_not_restored_onto_it(port: Harbour, podman: Podman) -> None:
    async with orphaned(port, podman, copy_dies=True) as ends:
        ends.target._note(WOKEN)
        with pytest.raises(FerryError) as caught:
            await ends.resume()
        assert caught.value.code == "heap_gone"
        assert processes.occupant(ends.there.init_pid) is None


async def test_a_source_that_cannot_be_looked_for_is_not_told_as_gone(port: Harbour, podman: Podman) -> None:
    async with orphaned(port, podman, copy_dies=False) as ends:
        await ends.resume()
        silent = Source(Podman(f"unix://{port.images}/nobody.sock"), port.images, ends.request)
        with pytest.raises(FerryError) as caught:
            await silent.release()
        assert caught.value.code == "podman_unreachable"
        assert processes.occupant(ends.here.init_pid) is not None
        await ends.source.release()
        assert processes.occupant(ends.here.init_pid) is None


async def test_a_copy_that_dies_before_it_has_its_socket_is_restored_into_the_same_dock(
    port: Harbour, podman: Podman
) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        async with Ends(port, podman, here, there) as ends:
            await ends.source.hold()
            await ends.source.dump()
            client.send(there, "early")
            await ends.target.restore()
            await ends.target.stand_by()
            assert ends.target._server is not None
            assert await ends.target._server.kill()
            await ends.resume()
            await ends.source.release()
        assert (await client.answer())[2] == "early"


async def test_a_berth_that_is_made_anew_after_the_restore_gets_a_dock_of_its_own(
    port: Harbour, podman: Podman
) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        async with Ends(port, podman, here, there) as ends:
            await ends.source.hold()
            await ends.source.dump()
            await ends.target.restore()
            podman_command("rm", "-f", "-t", "0", there.container)
            there = await port.berth("b")
            await ends.resume()
            await ends.source.release()
        assert await client.ask(there, "anew") == 1


async def test_a_copy_that_had_its_socket_is_not_restored_again(port: Harbour, podman: Podman) -> None:
    """It may have sent: the same packet numbers again, under the same keys, would be another packet's."""
    here, there = await port.berth("a", ECHO), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        await ends.source.hold()
        await ends.source.dump()
        await ends.target.restore()
        await ends.target.resume()
        await ends.target.close()  # the agent ends before it could say so
        os.kill(occupant_pid(there), signal.SIGKILL)
        ends.target = Target(podman, port.images, ends.request)
        await ends.resume()
        await ends.source.release()
    assert processes.occupant(there.init_pid) is None
    assert processes.occupant(here.init_pid) is None


async def test_a_restore_that_breaks_after_it_was_reported_is_done_again(port: Harbour, podman: Podman) -> None:
    """The commit may be written by then: the images are still there, and forward is the only way."""
    here, there = await port.berth("a", ECHO), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        await ends.source.hold()
        await ends.source.dump()
        await ends.target.restore()
        (broken,) = ends.target._criu.restored()  # type: ignore[union-attr]
        with broken:
            assert await broken.kill()
        with pytest.raises(FerryError) as refused:
            await ends.target.stand_by()
        assert refused.value.code == "criu_failed"
        with EchoClient() as client:
            client.send(there, "queued all the while")
            await asyncio.gather(ends.resume(), ends.source.release())
            assert (await client.answer())[2] == "queued all the while"
    assert images_left(port) == []


async def test_a_server_that_does_not_park_refuses_the_hold_and_serves_on(
    port: Harbour, podman: Podman, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "HOLD_MARGIN", 0.1)
    here, there = await port.berth("a", ECHO, env={"ECHO_STUBBORN": "1"}), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        with pytest.raises(FerryError, match="did not give up its socket") as caught:
            await ends.source.hold()
        assert caught.value.code == "hold_refused"
        await ends.source.abort()
    with EchoClient() as client:
        assert await client.ask(here, "still here") == 1


async def test_a_server_that_exits_on_sigterm_is_reported_as_gone(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO, env={"ECHO_EXIT": "1"}), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        with pytest.raises(FerryError, match="was not armed") as caught:
            await ends.source.hold()
        assert caught.value.code == "server_gone"
        await ends.source.abort()
        await ends.target.abort()


async def test_berths_that_do_not_fit_are_refused(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    for ends, end, code in (
        (Ends(port, podman, here, here), "target", "berth_busy"),
        (Ends(port, podman, there, here), "source", "server_gone"),
    ):
        with pytest.raises(FerryError) as caught:
            await getattr(ends, end).prepare()
        assert caught.value.code == code
        await getattr(ends, end).close()
    squatter = bind_parked(there.init_pid, PORT)
    ends = Ends(port, podman, here, there)
    with pytest.raises(FerryError) as caught:
        await ends.target.prepare()
    squatter.close()
    await ends.target.close()
    assert caught.value.code == "port_taken"
    async with Ends(port, podman, here, there):
        rival = Ends(port, podman, here, there, epoch=2)
        with pytest.raises(FerryError, match="Another agent") as caught:
            await rival.source.prepare()
        await rival.source.close()
    with pytest.raises(FerryError) as caught:
        await podman.berth("nowhere")
    assert caught.value.code == "berth_gone"


async def test_podman_that_does_not_answer_is_named(tmp_path: Path) -> None:
    podman = Podman(f"unix://{tmp_path}/none.sock")
    with pytest.raises(FerryError) as caught:
        await podman.berths()
    podman.close()
    assert caught.value.code == "podman_unreachable"
    assert "none.sock" in caught.value.message


def _of(pid: int, what: str) -> str:
    path = f"/proc/{pid}/{what}"
    return os.readlink(path) if what.startswith("ns/") else Path(path).read_text()
