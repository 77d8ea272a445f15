"""Podman's API service, which the agents talk to: used where one answers, started and stopped where none does."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from quicferry.host.command import attempt
from quicferry.protocol.errors import FerryError

DIRECTORY_VARIABLE: Final = "QUICFERRY_PODMAN_DIR"
DEFAULT_DIRECTORY: Final = "/run/podman"
SOCKET_NAME: Final = "podman.sock"
STATE: Final = Path("/run/quicferry")
"""Where the service that we started is remembered."""

START_TIMEOUT: Final = 15.0
STOP_TIMEOUT: Final = 10.0
ANSWER_TIMEOUT: Final = 5.0


class _Started(msgspec.Struct, frozen=True):
    """Our own service: its PID and when that process started, so that a PID used again is not mistaken."""

    pid: int
    start_ticks: int
    socket: str


def directory() -> Path:
    """The directory that compose mounts into the agents; its socket is ``podman.sock``."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or DEFAULT_DIRECTORY)


def socket_path() -> Path:
    return directory() / SOCKET_NAME


def answers(path: Path) -> bool:
    """Whether a podman service answers on the unix socket ``path``."""
    request = b"GET /libpod/_ping HTTP/1.1\r\nHost: podman\r\nConnection: close\r\n\r\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            connection.connect(str(path))
            connection.sendall(request)
            status = connection.recv(64)
    except OSError:
        return False
    return status.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200"))


def ensure(env: Mapping[str, str]) -> bool:
    """See that a service answers on :func:`socket_path`; True if it had to be started.

    systemd's own unit is preferred where it looks after that path. Raises FerryError ``podman_unreachable``.
    """
    path = socket_path()
    if answers(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if directory() == Path(DEFAULT_DIRECTORY) and Path("/run/systemd/system").is_dir():
        attempt(["systemctl", "start", "podman.socket"], timeout=START_TIMEOUT)
        if answers(path):
            return True
    _start(path, env)
    return True


def _start(path: Path, env: Mapping[str, str]) -> None:
    STATE.mkdir(parents=True, exist_ok=True, mode=0o755)
    log = STATE / "podman-service.log"
    path.unlink(missing_ok=True)  # a dead service's socket would be in the way
    command = ["podman", "system", "service", "--time=0", f"unix://{path}"]
    try:
        # A process of its own session that outlives us; posix_spawn leaves no object that minds.
        pid = os.posix_spawnp(
            command[0],
            command,
            {**os.environ, **env},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        raise FerryError(
            "podman_unreachable",
            f"podman did not start: {error.strerror}.",
            hint="Install it: apt-get install podman, or make setup.",
        ) from None
    deadline = time.monotonic() + START_TIMEOUT
    while not answers(path):
        if _ended(pid) or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip()[-1_000:]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise FerryError(
                "podman_unreachable",
                f"podman's service did not come up on {path}: {said or 'it said nothing'}.",
                hint=f"Try by hand: podman system service --time=0 unix://{path}",
            )
        time.sleep(0.05)  # nothing tells when a unix socket begins to answer
    _memory().write_bytes(msgspec.json.encode(_Started(pid, _start_ticks(pid) or 0, str(path))))


def stop_own() -> bool:
    """Stop the service that :func:`ensure` started for :func:`directory`, if it did; True if one was stopped."""
    return _stop(_memory())


def _stop(memory: Path) -> bool:
    try:
        started = msgspec.json.decode(memory.read_bytes(), type=_Started)
    except (OSError, msgspec.DecodeError):
        return False
    if _start_ticks(started.pid) == started.start_ticks:
        _end(started.pid)
    Path(started.socket).unlink(missing_ok=True)
    memory.unlink(missing_ok=True)
    return True


def _end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], STOP_TIMEOUT)[0]:
                break
    finally:
        os.close(handle)
    _ended(pid)


def _memory() -> Path:
    return STATE / f"podman-service{str(directory()).replace('/', '-')}.json"


def _ended(pid: int) -> bool:
    """Collect ``pid`` if it is our child and has ended."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()


def _start_ticks(pid: int) -> int | None:
    """Field 22 of proc_pid_stat(5); None if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None
