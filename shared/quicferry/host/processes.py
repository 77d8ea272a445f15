"""The processes of a berth, read from /proc and held by pidfd so that a reused PID is never signalled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Final

from quicferry.protocol.errors import FerryError

INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC
"""Inode of the first PID namespace (PROC_PID_INIT_INO in the kernel's proc_ns.h)."""
LOOKS: Final = 10
"""How often a list of children may change while it is read; then every process is asked for its parent instead."""
NICE: Final = -10
"""See setpriority(2)."""
RESUMED_NICE: Final = NICE - 5
"""Of a server that has clients waiting: before us and CRIU, who go before others."""
SERVER_PID: Final = 5000
"""The PID a server has inside its berth: high, so that it is free in any other berth."""
STREAMS: Final = (0, 1, 2)


IN_BETWEEN: Final = 2.0
"""Most seconds that a server takes to park or to adopt, all threads halted (HALT_SECONDS in heap.c)."""


class Process:
    """A running process: its PID as we see it, its PID inside its berth, and a pidfd (pidfd_open(2)).

    Close it when done; a context manager does.
    """

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError if there is no such process."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)
        try:
            self.berth_pid = namespace_pid(pid)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the process; it is not touched. Safe to repeat."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """The pidfd; closed with this object."""
        return self._fd

    def signal(self, number: int) -> bool:
        """Send a signal; False if the process has exited."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return False
        return True

    def nice(self) -> int:
        """Its priority, see getpriority(2); 0 if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            return os.getpriority(os.PRIO_PROCESS, self.pid)
        return 0

    def set_nice(self, nice: int) -> None:
        """Without CAP_SYS_NICE it stays as it is, and so if it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, self.pid, nice)

    @property
    def alive(self) -> bool:
        """Whether it is there and no zombie."""
        return self.signal(0) and runs(self.pid)

    async def exited(self, timeout: float) -> bool:
        """Wait until the process has exited, ``timeout`` seconds at most; whether it has."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        # A reader of its own for each waiter: asyncio keeps one callback for each descriptor.
        fd = os.dup(self._fd)
        try:
            loop.add_reader(fd, _set, done)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await done
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return done.done() and not done.cancelled()

    async def kill(self, timeout: float = 2.0) -> bool:
        """SIGKILL and wait; whether it is gone. SIGKILL works on a traced, stopped task too (ptrace(2))."""
        self.signal(signal.SIGKILL)
        return await self.exited(timeout)


def hurry() -> None:
    """Go before others on a busy machine, and CRIU after us: clients wait for nothing else.

    What is restored gets the priority it was dumped with. Without CAP_SYS_NICE it stays as it is.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def occupant(init_pid: int) -> Process | None:
    """The server in the berth whose PID 1 is ``init_pid``, or None if the berth is empty.

    Raises FerryError ``berth_gone`` if the berth's init has exited.
    """
    if not runs(init_pid):
        raise FerryError(
            "berth_gone", f"The berth's init (PID {init_pid}) has exited.", hint="Start the berth again."
        )
    found: Process | None = None
    for child in children(init_pid):
        try:
            process = Process(child)
        except ProcessLookupError:
            continue
        # Looked at again with the pidfd in hand: from here the PID can't be another process's.
        if not process.alive or _parent(child) != init_pid:
            process.close()
        elif found is None or process.berth_pid == SERVER_PID:
            if found is not None:
                found.close()
            found = process
        else:
            process.close()
    return found


def berth_pid_taken(init_pid: int, number: int) -> bool:
    """Whether any process or thread in the berth has PID ``number`` inside it."""
    space = pid_namespace(init_pid)
    for pid in _all():
        if pid_namespace(pid) != space:
            continue
        with contextlib.suppress(ProcessLookupError):  # it ends while we look
            for task in _tasks(pid):
                with contextlib.suppress(ProcessLookupError):
                    if _namespace_pids(f"/proc/{pid}/task/{task}/status")[-1] == number:
                        return True
    return False


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    return _state(pid) not in ("Z", "X", "")


def guests(init_pid: int, command: str) -> list[Process]:
    """Processes called ``command`` that were put into the berth from outside, as nsenter does."""
    space = pid_namespace(init_pid)
    found: list[Process] = []
    for pid in _all():
        if pid == init_pid or pid_namespace(pid) != space or pid_namespace(_parent(pid)) == space:
            continue
        with contextlib.suppress(ProcessLookupError):
            if _field(f"/proc/{pid}/status", "Name", "") == command:
                found.append(Process(pid))
    return found


def is_init(pid: int) -> bool:
    """Whether ``pid`` is PID 1 of a PID namespace below ours."""
    try:
        pids = _namespace_pids(f"/proc/{pid}/status")
    except ProcessLookupError:
        return False
    return len(pids) >= 2 and pids[0] == pid and pids[-1] == 1 and runs(pid)


def check_init(init_pid: int, container: str) -> None:
    """Check that ``init_pid``, as podman gives it, is PID 1 of ``container`` here too.

    Raises FerryError ``host_pid_namespace`` if this process lives in a PID namespace of its own, ``berth_gone``
    if it does not: then podman has missed the container's end, as it does when conmon was killed with it.
    """
    if is_init(init_pid):
        return
    if in_host_pid_namespace():
        raise FerryError(
            "berth_gone",
            f"Podman takes container {container[:12]} for running, but its PID {init_pid} is gone.",
            hint=f"Remove it with: podman rm -f {container[:12]}",
        )
    raise FerryError(
        "host_pid_namespace",
        f"PID {init_pid}, podman's PID for container {container[:12]}, is not that container here.",
        hint="Run the agent with the host's PID namespace: pid: host in compose, --pid=host with podman.",
    )


def in_host_pid_namespace() -> bool:
    """Whether this process sees every process of the machine by its PID there (pid_namespaces(7))."""
    return os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE


def children(pid: int) -> list[int]:
    """The child processes of ``pid``, of all its threads (proc_pid_task_children(5)).

    The kernel leaves one out when the one listed before it is reaped meanwhile. That one is not in the next list, so
    two lists that are the same leave nothing out.
    """
    try:
        before: list[int] | None = None
        for _ in range(LOOKS):
            if (found := _listed_children(pid)) == before:
                return found
            before = found
    except (FileNotFoundError, ProcessLookupError):
        pass  # a kernel without CONFIG_PROC_CHILDREN, or the process is gone: then nobody has it as parent
    return sorted(other for other in _all() if _parent(other) == pid)


def _listed_children(pid: int) -> list[int]:
    found: list[int] = []
    for task in _tasks(pid):
        with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            found += [int(word) for word in file.read().split()]
    return sorted(found)


def namespace_pid(pid: int) -> int:
    """``pid``'s PID in its own, innermost PID namespace. Raises ProcessLookupError."""
    return _namespace_pids(f"/proc/{pid}/status")[-1]


def pid_namespace(pid: int) -> int:
    """An identity for the PID namespace of ``pid``; 0 if the process is gone or none of our business."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


def rss_bytes(pid: int) -> int:
    """Resident memory. Raises ProcessLookupError."""
    return int(_field(f"/proc/{pid}/status", "VmRSS", "0 kB").split()[0]) * 1024


def outer_pipes(pid: int) -> dict[str, str]:
    """Standard streams that are pipes: descriptor number to ``pipe:[inode]``, as CRIU names them."""
    found: dict[str, str] = {}
    for number in STREAMS:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            if link.startswith("pipe:["):
                found[str(number)] = link
    return found


def is_held(pid: int) -> bool:
    """Whether the server stands still: it waits for SIGUSR2, and has no UDP socket, so it can't send.

    It blocks SIGUSR2 from before it parks until it has adopted, but the kernel shows a signal that is
    being waited for (sigtimedwait(2)) as not blocked: then it is the wait itself that tells.
    """
    try:
        waits = _blocks_wake(pid) or "sigtimedwait" in _read(f"/proc/{pid}/wchan")
        return waits and not udp_sockets(pid)
    except ProcessLookupError:
        return False


async def stands_still(pid: int) -> bool:
    """The same, but a server that is neither still nor serving is looked at again, for IN_BETWEEN at most.

    It may be parking or adopting, and then it has a socket and blocks the signal; or its wait was just over and is
    about to begin anew, as it is every few milliseconds where threads of its own may take the signal.
    """
    end = time.monotonic() + IN_BETWEEN
    while not is_held(pid):
        try:
            serves = bool(udp_sockets(pid)) and not _blocks_wake(pid)
        except ProcessLookupError:
            return False
        if serves or time.monotonic() > end:
            return False
        await asyncio.sleep(0.002)  # nothing announces it
    return True


def udp_sockets(pid: int) -> list[str]:
    """The inodes of the UDP sockets that the process has open. Raises ProcessLookupError."""
    links: set[str] = set()
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    for fd in descriptors:
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    inodes: list[str] = []
    for table in ("udp", "udp6"):
        lines = _read(f"/proc/{pid}/net/{table}").splitlines()[1:]
        inodes += [line.split()[9] for line in lines]
    return [inode for inode in inodes if f"socket:[{inode}]" in links]


def _blocks_wake(pid: int) -> bool:
    return bool(int(_field(f"/proc/{pid}/status", "SigBlk", "0"), 16) & (1 << (signal.SIGUSR2 - 1)))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""  # without IPv6 there is no udp6


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _namespace_pids(status: str) -> list[int]:
    pids = [int(word) for word in _field(status, "NSpid", "").split()]
    if not pids:
        raise ProcessLookupError(f"no PIDs in {status}")
    return pids


def _parent(pid: int) -> int:
    try:
        return int(_field(f"/proc/{pid}/status", "PPid", "-1"))
    except ProcessLookupError:
        return -1


def _state(pid: int) -> str:
    try:
        return _field(f"/proc/{pid}/status", "State", "")[:1]
    except ProcessLookupError:
        return ""


def _field(path: str, name: str, default: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key == name:
                    return value.strip()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process behind {path}") from None
    return default


def _tasks(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def _all() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
