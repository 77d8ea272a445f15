"""Processes by pidfd and /proc, with real children."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from quicferry.host import processes
from quicferry.host.processes import Process
from quicferry.protocol.errors import FerryError

HOLDS = """
import signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
print("has a socket", flush=True)
sys.stdin.readline()
udp.close()
print("holds", flush=True)
signal.sigwaitinfo({signal.SIGUSR2})
print("runs", flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
sys.stdin.readline()
"""


POLLS = "pthread_sigmask(2, [])\nwhile signal.sigtimedwait({signal.SIGUSR2}, 0.001) is None: pass"
NO_PROCESS = 2**22 + 1
"""More than PID_MAX_LIMIT (proc_sys_kernel(5))."""


@contextlib.asynccontextmanager
async def child(code: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    made = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=pipe, stdout=pipe)
    try:
        yield made
    finally:
        if made.returncode is None:
            made.kill()
        await made.wait()


async def line(made: asyncio.subprocess.Process) -> str:
    assert made.stdout is not None
    async with asyncio.timeout(10):
        return (await made.stdout.readline()).decode().strip()


async def test_a_process_is_signalled_waited_for_and_then_gone() -> None:
    async with child("import sys; print('up', flush=True); sys.stdin.readline()") as made:
        assert await line(made) == "up"
        with Process(made.pid) as process:
            assert process.alive
            assert process.berth_pid == processes.namespace_pid(made.pid)
            assert not await process.exited(0.01)
            assert made.pid in processes.children(os.getpid())
            assert processes.rss_bytes(made.pid) > 1_000_000
            assert process.signal(signal.SIGTERM)
            assert await process.exited(10)
            assert not process.alive
            await made.wait()
            assert not process.signal(signal.SIGTERM)
        with pytest.raises(ProcessLookupError):
            Process(made.pid)


async def test_a_stubborn_process_is_killed() -> None:
    code = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('up', flush=True); sys.stdin.readline()"
    async with child(code) as made:
        await line(made)
        with Process(made.pid) as process:
            process.signal(signal.SIGTERM)
            assert await process.kill()


async def test_held_means_waiting_for_the_signal_without_a_socket() -> None:
    async with child(HOLDS) as made:
        assert made.stdin is not None
        assert await line(made) == "has a socket"
        assert len(processes.udp_sockets(made.pid)) == 1
        assert not processes.is_held(made.pid)  # it blocks the signal already, but could send
        made.stdin.write(b"\n")
        assert await line(made) == "holds"
        # Neither for the moment between the two, before it sleeps.
        async with asyncio.timeout(10):
            while not processes.is_held(made.pid):  # noqa: ASYNC110 - /proc announces nothing
                await asyncio.sleep(0)
        # The kernel shows a signal that is waited for as not blocked: both states count.
        async with asyncio.timeout(10):
            while "sigtimedwait" not in processes._read(f"/proc/{made.pid}/wchan"):  # noqa: ASYNC110 - /proc
                await asyncio.sleep(0)
        assert processes.is_held(made.pid)
        made.send_signal(signal.SIGUSR2)
        assert await line(made) == "runs"
        async with asyncio.timeout(10):
            while processes.is_held(made.pid):  # noqa: ASYNC110 - /proc announces nothing
                await asyncio.sleep(0)
    assert not processes.is_held(made.pid)


async def test_a_server_that_is_parking_will_stand_still() -> None:
    async with child(HOLDS) as made:
        assert made.stdin is not None
        await line(made)
        assert not processes.is_held(made.pid)
        asyncio.get_running_loop().call_later(0.05, made.stdin.write, b"\n")
        assert await processes.stands_still(made.pid)


async def test_a_wait_that_is_over_every_few_milliseconds_is_one_wait() -> None:
    """As of a server with threads and a private heap: between two waits nothing shows that it stands still."""
    async with child(HOLDS.replace("sigwaitinfo({signal.SIGUSR2})", POLLS)) as made:
        assert made.stdin is not None
        await line(made)
        made.stdin.write(b"\n")
        await line(made)
        for _ in range(300):
            assert await processes.stands_still(made.pid)


async def test_a_server_that_serves_does_not_stand_still() -> None:
    code = "import socket; udp = socket.socket(2, 2); udp.bind(('127.0.0.1', 0)); print(1, flush=True); input()"
    async with child(code) as made:
        await line(made)
        assert not await processes.stands_still(made.pid)
    assert not await processes.stands_still(NO_PROCESS)


async def test_only_pipes_are_outer_pipes() -> None:
    async with child("import os, sys; os.dup2(os.open('/dev/null', 2), 2); print('up', flush=True); input()") as made:
        await line(made)
        found = processes.outer_pipes(made.pid)
        assert set(found) <= {"0", "1"}  # asyncio gives a child's stdin a socket pair or a pipe
        assert found["1"] == os.readlink(f"/proc/{made.pid}/fd/1")


async def test_a_process_that_ends_while_pids_are_looked_through_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by the soak: an abort met one between two looks, and had to be asked for again."""
    async with child("print(1, flush=True); input()") as made:
        await line(made)
        space = processes.pid_namespace
        monkeypatch.setattr(processes, "_all", lambda: iter((NO_PROCESS, made.pid)))
        monkeypatch.setattr(processes, "pid_namespace", lambda pid: space(os.getpid() if pid == NO_PROCESS else pid))
        assert processes.berth_pid_taken(os.getpid(), made.pid)
        assert not processes.berth_pid_taken(os.getpid(), NO_PROCESS)


def test_a_child_that_the_kernel_left_out_of_one_list_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaped while it was listed, the first took the second with it: so in one of a few hundred cases, when tried."""
    lists = iter([[1001], [1002], [1002]])
    monkeypatch.setattr(processes, "_listed_children", lambda _: next(lists))
    assert processes.children(os.getpid()) == [1002]


async def test_children_that_never_stay_the_same_are_told_by_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(1001)
    monkeypatch.setattr(processes, "_listed_children", lambda _: [next(numbers)])
    async with child("import sys; sys.stdin.readline()") as made:
        assert made.pid in processes.children(os.getpid())
    assert next(numbers) == 1001 + processes.LOOKS


def test_a_berth_whose_init_is_gone_is_told() -> None:
    with pytest.raises(FerryError) as caught:
        processes.occupant(2**22 + 1)
    assert caught.value.code == "berth_gone"


@pytest.mark.parametrize(
    ("in_host", "code", "hint"),
    [(True, "berth_gone", "podman rm -f c0ffee"), (False, "host_pid_namespace", "pid: host")],
)
def test_a_process_that_is_no_container_init_is_told(
    monkeypatch: pytest.MonkeyPatch, in_host: bool, code: str, hint: str
) -> None:
    monkeypatch.setattr(processes, "in_host_pid_namespace", lambda: in_host)
    for pid in (os.getpid(), 2**22 + 1):
        with pytest.raises(FerryError) as caught:
            processes.check_init(pid, "c0ffee")
        assert caught.value.code == code
        assert hint in caught.value.hint
