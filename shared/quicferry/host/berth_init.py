#!/usr/bin/python3 -IS
"""A berth's PID 1: starts the first server at a fixed PID, reaps, passes signals on, outlives a move.

Runs by itself from one file with the standard library only, so that an empty berth costs little and
nothing of ours is loaded beside the server. Usage::

    berth-init [--pid 5000] [--grace 5] [-- COMMAND [ARGUMENT ...]]

The command gets PID ``--pid`` by clone3(2) with set_tid, which needs CAP_CHECKPOINT_RESTORE: a server that
starts high leaves its PID free in every other berth, whoever else ran there (its threads: host/thread_ids.py).

A server killed by SIGKILL was moved away (CRIU ends a released source so) and the berth stays, empty. One
that ends in any other way, or was killed for lack of memory, ends the berth with its status, so that the
container's restart policy applies.
Servers that a move brought in do not end the berth. Exit status: the command's, 128 + signal if a signal
ended it, 127 if it could not be started, 0 for an empty berth that was told to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

DEFAULT_PID = 5000
DEFAULT_GRACE = 5.0
"""Seconds between passing SIGTERM on and SIGKILL; below podman's own 10."""

HEAP_VARIABLE = "QUICFERRY_HEAP"
SHARED, PRIVATE = "shared", "private"
HEAP_OWNER = "QUICFERRY_HEAP_PID"
HEAP_LIBRARY = "/usr/local/lib/libquicferry-heap.so"
HEAP_MALLOC = "libmimalloc.so.3"

SYS_CLONE3 = 435
"""The same on every architecture (clone3(2))."""
PR_SET_CHILD_SUBREAPER = 36

TO_STOP = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
WAITED_FOR = TO_STOP | {signal.SIGCHLD}

NOT_STARTED = 127
OOM_COUNTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Where the container's cgroup counts the kills for lack of memory (cgroups(7)), version 2 and 1."""


class _CloneArgs(ctypes.Structure):
    """``struct clone_args`` up to ``cgroup`` (clone3(2))."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


def log(event: str, **fields: object) -> None:
    """One line in the services' own form: time, event, fields."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    now = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds // 1_000:06}Z"
    text = " ".join([event, *(f"{name}={value}" for name, value in fields.items())])
    with contextlib.suppress(OSError):  # the reader of our log may be gone; the server matters more
        print(f"{now} [info     ] {text}", flush=True)


def _fork_at(pid: int) -> int:
    """fork(2), the child with exactly ``pid``; any PID if 0. Raises OSError."""
    if pid == 0:
        return os.fork()
    libc = ctypes.CDLL(None, use_errno=True)
    tid = (ctypes.c_int * 1)(pid)
    args = _CloneArgs(exit_signal=signal.SIGCHLD, set_tid=ctypes.addressof(tid), set_tid_size=1)
    child: int = libc.syscall(SYS_CLONE3, ctypes.byref(args), ctypes.sizeof(args))
    if child < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return child


def share_heap(environment: MutableMapping[str, str]) -> None:
    """Have this process's command preload the shared heap (containers/heap/heap.c), if it is here and wanted.

    Python's own allocator is set aside for the preloaded one: else only its arenas would be in the heap.
    """
    wanted = environment.get(HEAP_VARIABLE) or SHARED
    if wanted not in (SHARED, PRIVATE):
        log(
            "heap_setting_unknown",
            setting=wanted,
            hint=f"{HEAP_VARIABLE} is {SHARED} or {PRIVATE}; it is {PRIVATE} now",
        )
    if wanted == SHARED and os.path.exists(HEAP_LIBRARY):
        before = environment.get("LD_PRELOAD")
        environment["LD_PRELOAD"] = ":".join([HEAP_LIBRARY, HEAP_MALLOC, *([before] if before else [])])
        environment.setdefault("PYTHONMALLOC", "malloc")
        environment[HEAP_OWNER] = str(os.getpid())


def spawn(command: Sequence[str], pid: int) -> int:
    """Start ``command`` as a session of its own with ``pid``; returns its PID. Raises OSError.

    Its standard input is this mount namespace's /dev/null and no other descriptor but stdout and stderr is
    passed on: CRIU can dump nothing that was opened outside the berth.
    """
    child = _fork_at(pid)
    if child:
        return child
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a command expects the default
            signal.signal(number, signal.SIG_DFL)
        share_heap(os.environ)
        os.execvp(command[0], list(command))  # noqa: S606 - no shell is what we want
    except OSError as error:
        log("server_not_started", command=command[0], error=error.strerror)
    finally:
        os._exit(NOT_STARTED)


def children() -> list[int]:
    """PIDs of this process's direct children."""
    me = os.getpid()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # proc_pid_stat(5): the name in parentheses may hold anything, so read from behind it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == me:
                    found.append(int(entry.name))
    return found


def reap() -> list[tuple[int, int]]:
    """Collect every child that has ended: (PID, status as exit code, negative for a signal)."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def oom_kills() -> int:
    """How often the kernel has killed in this container for lack of memory; 0 where nothing counts it."""
    for path in OOM_COUNTS:
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0


def exit_status(code: int, *, out_of_memory: bool = False) -> int | None:
    """What the berth exits with when its own command ended with ``code``; None if it stays."""
    if code == -signal.SIGKILL and not out_of_memory:
        return None
    return code if code >= 0 else 128 - code


class Berth:
    """The loop of one berth; :meth:`run` returns the exit status."""

    def __init__(self, command: Sequence[str], *, pid: int, grace: float) -> None:
        self._command = command
        self._pid = pid
        self._grace = grace
        self._own: int | None = None
        """The command's PID until it has ended once: later occupants do not decide over the berth."""
        self._oom_kills = 0

    def run(self) -> int:
        # Waiting for blocked signals leaves no gap between looking and sleeping, and PID 1 would
        # otherwise never see a signal without a handler (pid_namespaces(7)).
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
        _become_subreaper()
        if self._command:
            self._oom_kills = oom_kills()
            try:
                self._own = spawn(self._command, self._pid)
            except OSError as error:
                log("server_not_started", command=self._command[0], error=error.strerror, hint=_hint(error))
                return NOT_STARTED
            log("server_started", pid=self._own, command=self._command[0])
        else:
            log("berth_empty")
        while True:
            number = signal.sigwaitinfo(WAITED_FOR).si_signo
            if number in TO_STOP:
                return self._stop()
            status = self._collect()
            if status is not None:
                return status

    def _collect(self) -> int | None:
        status = None
        for pid, code in reap():
            if pid != self._own:
                continue
            self._own = None
            status = exit_status(code, out_of_memory=oom_kills() > self._oom_kills)
            log("server_left" if status is None else "server_ended", pid=pid, status=code)
        return status

    def _stop(self) -> int:
        """Pass SIGTERM to the servers, give them the grace time, and end what is left."""
        status = 0
        deadline = time.monotonic() + self._grace
        for pid in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while children():
            # CHLD may have been taken together with an earlier one, hence a look before each wait.
            for pid, code in reap():
                if pid == self._own:
                    self._own = None
                    status = exit_status(code) or 0
            if not (left := children()):
                break
            if (patience := deadline - time.monotonic()) <= 0:
                log("server_killed", pids=",".join(map(str, left)), after_s=self._grace)
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return 128 + signal.SIGKILL
            signal.sigtimedwait({signal.SIGCHLD}, patience)
        log("berth_stopped", status=status)
        return status


def _become_subreaper() -> None:
    """Adopt orphans even where we are not PID 1 (prctl(2)); as PID 1 we do anyway."""
    if os.getpid() != 1:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _hint(error: OSError) -> str:
    match error.errno:
        case errno.EPERM:
            return "give the container CAP_CHECKPOINT_RESTORE"
        case errno.EEXIST:
            return "the PID is taken in this container"
        case errno.ENOSYS:
            return "the seccomp profile or the kernel (before 5.5) lacks clone3 with set_tid"
        case errno.EINVAL:
            return "the PID is above pid_max"
        case _:
            return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="berth-init", description="PID 1 of a quicferry berth.")
    parser.add_argument("--pid", type=int, default=DEFAULT_PID, help="PID of the server; 0 for any")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the first server; none: an empty berth")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return Berth(command, pid=options.pid, grace=options.grace).run()


if __name__ == "__main__":
    sys.exit(main())
