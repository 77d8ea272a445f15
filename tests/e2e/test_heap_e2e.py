"""The shared heap on real containers: what is copied, who may touch it, and who keeps it alive."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from quicferry.host import processes
from quicferry.host.heap import HUGE_PAGE, Heap
from quicferry.host.podman import Podman
from quicferry.protocol.errors import FerryError
from tests.e2e.berths import ECHO, IMAGE, PORT, PROJECT, EchoClient, Harbour, TestBerth
from tests.e2e.berths import podman as run_podman
from tests.e2e.moves_by_hand import Ends, die, occupant_pid

pytestmark = pytest.mark.e2e

SERVER = ("python", "/test/heap_server.py")
LOOKS = 20


def digest(heap: Heap) -> str:
    """Of everything written to the heap so far."""
    found, at, end = hashlib.sha256(), 0, os.fstat(heap.fd).st_size
    with contextlib.suppress(OSError):  # ENXIO: no data beyond (lseek(2))
        while at < end:
            start = os.lseek(heap.fd, at, os.SEEK_DATA)
            at = os.lseek(heap.fd, start, os.SEEK_HOLE)
            found.update(os.pread(heap.fd, at - start, start))
    return found.hexdigest()


def heap_of(berth: TestBerth) -> Heap:
    heap = Heap.of(occupant_pid(berth))
    assert heap is not None
    return heap


async def written(client: EchoClient, berth: TestBerth) -> int:
    """The busy thread's count."""
    client.send(berth, "how many?")
    return int(await client.line())


def test_the_seam_under_the_allocators() -> None:
    script = f"{PROJECT}/tests/e2e/heap_seam.py:/test/heap_seam.py:ro"
    said = run_podman(
        *("run", "--rm", "--tmpfs", "/run", "-v", script, "--entrypoint", "", IMAGE),
        *("berth-init", "--pid", "0", "--", "python3", "/test/heap_seam.py"),
    )
    assert "status=0" in said
    assert "\nok\n" in said


@pytest.mark.parametrize(("options", "heaps"), [(("--tmpfs", "/run"), 1), ((), 0)])
def test_a_heap_is_never_on_a_disk(options: tuple[str, ...], heaps: int) -> None:
    """Keys are in it. Without --tmpfs the berth's /run is a part of the container's file system."""
    said = run_podman(
        *("run", "--rm", *options, "--entrypoint", "", IMAGE, "berth-init", "--pid", "0", "--"),
        *("grep", "-c", "quicferry-heap (deleted)", "/proc/self/maps"),
        check=False,  # grep's status, and so the berth's, says whether there was one
    )
    assert f"\n{heaps}\n" in said


async def test_memory_that_is_shared_is_not_copied(port: Harbour, podman: Podman) -> None:
    pages = {}
    for kind in ("shared", "private"):
        env = {"QUICFERRY_HEAP": kind, "ECHO_BALLAST_MIB": "64"}
        here, there = await port.berth(f"a-{kind}", ECHO, env=env), await port.berth(f"b-{kind}", env=env)
        with EchoClient() as client:
            assert await client.ask(here, "first") == 1
            async with Ends(port, podman, here, there) as ends:
                pages[kind] = (await ends.move()).pages
            assert await client.ask(there, "second") == 2
    ballast = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert pages["private"] > ballast
    assert pages["shared"] < ballast / 10


def huge_bytes(berth: TestBerth) -> int:
    """Of the server's heap, what it has mapped by huge pages (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{occupant_pid(berth)}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped:"))


def compact_memory() -> None:
    """Huge pages are made where the kernel finds room for them: it can move what is in between (sysctl/vm)."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/compact_memory").write_text("1", encoding="ascii")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="transparent huge pages are missing"
)
async def test_the_copy_maps_the_heap_by_huge_pages(port: Harbour, podman: Podman) -> None:
    """Page by page it would be hundreds of faults between the resume and the first answer."""
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        await client.ask(here, "first")
        assert not huge_bytes(here)
        for epoch in (1, 2, 3):  # best effort (madvise(2)): what finds no room at once may find it later
            compact_memory()
            async with Ends(port, podman, here, there, epoch=epoch) as ends:
                await ends.move()
            assert await client.ask(there, "elsewhere") == epoch + 1
            if huge_bytes(there) >= HUGE_PAGE:
                break
            here, there = there, await port.berth(f"c{epoch}")
        else:
            pytest.fail("no move put the heap into huge pages")


async def test_the_heap_outlives_the_berth_it_was_made_in(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", ECHO), await port.berth("b")
    with EchoClient() as client:
        await client.ask(here, "first")
        for epoch in (1, 2):
            async with Ends(port, podman, here, there, epoch=epoch) as ends:
                await ends.move()
            run_podman("rm", "-f", "-t", "0", here.container)
            assert await client.ask(there, "elsewhere") == epoch + 1
            here, there = there, await port.berth(f"c{epoch}")


async def test_nobody_writes_to_the_heap_while_two_copies_have_it(port: Harbour, podman: Podman) -> None:
    """Killed agents let both copies go, threads and all. What one wrote, the other would find in its memory."""
    here, there = await port.berth("a", SERVER), await port.berth("b")
    ends = Ends(port, podman, here, there)
    with EchoClient() as client, contextlib.closing(heap_of(here)) as heap:
        await written(client, here)
        busy = {digest(heap) for _ in range(LOOKS)}
        assert len(busy) > 1, "the busy thread is not busy: this test would see nothing"
        await die(port, podman, ends.request, "restored")
        for berth in (here, there):
            assert processes.is_held(occupant_pid(berth))
        assert heap_of(there).key == heap.key
        still = {digest(heap) for _ in range(LOOKS)}
        assert len(still) == 1
        try:
            await ends.target.abort()
            await ends.source.abort()
        finally:
            await ends.target.close()
            await ends.source.close()
        await port.log_line(here, "adopted rolled_back")
        first = await written(client, here)
        while await written(client, here) == first:
            pass
    assert processes.occupant(there.init_pid) is None


async def test_threads_go_on_at_the_target(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", SERVER), await port.berth("b")
    with EchoClient() as client:
        before = await written(client, here)
        async with Ends(port, podman, here, there) as ends:
            await ends.move()
        await port.log_line(there, "adopted moved")
        first = await written(client, there)
        assert first >= before
        while await written(client, there) == first:
            pass


@pytest.mark.parametrize("heap", ["shared", "private"])
async def test_a_program_that_the_server_started_comes_along(port: Harbour, podman: Podman, heap: str) -> None:
    env = {"QUICFERRY_HEAP": heap, "ECHO_CHILD": "1"}
    here, there = await port.berth("a", ECHO, env=env), await port.berth("b", env=env)
    with EchoClient() as client:
        async with Ends(port, podman, here, there) as ends:
            before = processes.children(occupant_pid(here))
            assert len(before) == 1
            assert Heap.of(before[0]) is None
            await ends.move()
        assert await client.ask(there, "with it") == 1
        assert len(processes.children(occupant_pid(there))) == 1
        assert not processes.runs(before[0])


async def test_a_thread_that_cannot_be_halted_refuses_the_hold(port: Harbour, podman: Podman) -> None:
    here, there = await port.berth("a", SERVER, env={"HEAP_DEAF": "1"}), await port.berth("b")
    async with Ends(port, podman, here, there) as ends:
        with pytest.raises(FerryError) as caught:
            await ends.source.hold()
        assert caught.value.code == "hold_refused"
        await port.log_line(here, "refused hold_refused")
        await ends.target.abort()
        await ends.source.abort()
    with EchoClient() as client:
        first = await written(client, here)
        while await written(client, here) == first:
            pass


async def test_a_heap_that_nobody_holds_is_told(port: Harbour, podman: Podman) -> None:
    """Both copies and both agents gone at once: nothing can bring the memory back, and that is what is said."""
    here, there = await port.berth("a", ECHO), await port.berth("b")
    ends = Ends(port, podman, here, there)
    await die(port, podman, ends.request, "restored")
    for berth in (here, there):
        with processes.Process(occupant_pid(berth)) as copy:
            assert await copy.kill()
    try:
        with pytest.raises(FerryError) as caught:
            await ends.resume()
        assert caught.value.code == "heap_gone"
    finally:
        await ends.target.close()
        await ends.source.close()


assert PORT == 4242  # what the scripts in the berths use
