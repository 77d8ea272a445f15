"""What CRIU's messages mean and what to do: turns its log's errors into one FerryError."""

from __future__ import annotations

import os
import re
from typing import Final

from quicferry.protocol.errors import FerryError

TAIL_BYTES: Final = 64 * 1024
MAX_LINES: Final = 6

_NEWER: Final = "Use an image with CRIU 4.2.1 or newer; older ones do not know this kernel."

HINTS: Final[tuple[tuple[str, str], ...]] = (
    (r"Unexpected rt vDSO area bounds", _NEWER),
    (r"Can't get \d+:\d+ opt: Operation not supported", _NEWER),
    (
        r"Can't fork for \d+: File exists",
        "The PID is taken in the target berth: its PID 1 must reap, and nothing but a server may start there.",
    ),
    (
        r"Can't fork for \d+: Operation not permitted",
        "The agent lacks CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN: run it privileged.",
    ),
    (
        r"Connected TCP socket",
        "The server still holds a TCP connection. Close it when asked to quiesce, and open it again afterwards.",
    ),
    (
        r"Can't lookup mount=",
        "The server has a file open that lies outside its container (podman exec leaves stdin so): start it "
        "with its standard streams redirected inside, as the berth's init does.",
    ),
    (
        r"External socket|unix connection|Unix socket \d+ with",
        "The server has a unix socket open whose other end is outside it: close it when asked to quiesce.",
    ),
    (r"Found dangling tty", "The server sits on a terminal: start the berth without -t."),
    (
        r"has bad size|has bad mode|has bad build-ID|Can't open file .* on restore",
        "A file the server has open differs in the target berth: both berths need the same image and mounts.",
    ),
    (r"CPU capabilities do not match", "The hosts' processors differ; move between equal ones."),
    (
        r"in parent pagemap",
        "The kernel's dirty tracking missed a merged mapping: move with pre_copy_rounds 0 (a full dump).",
    ),
    (r"io_uring|userfaultfd|perf_event", "CRIU can't carry this kind of descriptor: the server must not use it."),
    (r"Can't bind inet socket|Can't bind socket", "The server has a socket bound to an address the target lacks."),
    (r"No space left on device", "The images' tmpfs is full: give it more room."),
    (
        r"pid namespace without the process init",
        "CRIU ran outside the berth's PID namespace: the agent needs pid: host.",
    ),
)
"""Message pattern and hint, the most telling first."""


def tail(directory_fd: int, name: str) -> list[str]:
    """The error lines at the end of a CRIU log; its last lines if none is marked as error."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory_fd)
    except OSError:
        return []
    with os.fdopen(fd, "rb") as file:
        file.seek(max(0, os.fstat(fd).st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return important(lines)


def important(lines: list[str]) -> list[str]:
    """The lines worth showing, bounded; the first error tells most, so it stays."""
    errors = [line.strip() for line in lines if "Error" in line]
    chosen = errors or [line.strip() for line in lines if line.strip()]
    return [line[:300] for line in (chosen[:MAX_LINES] if errors else chosen[-MAX_LINES:])]


def hint_for(text: str) -> str:
    """What to do about a message of CRIU's; empty if it is none we know."""
    for pattern, hint in HINTS:
        if re.search(pattern, text):
            return hint
    return ""


def failure(what: str, lines: list[str], message: str = "") -> FerryError:
    """A ``criu_failed`` error for the step ``what``, with CRIU's own words and a hint where we know one."""
    words = list(dict.fromkeys(line for line in [message.strip(), *lines] if line))
    text = " | ".join(words)
    return FerryError(
        "criu_failed",
        f"CRIU's {what} failed: {text or 'it gave no reason'}",
        hint=hint_for(text) or "QUICFERRY_CRIU_LOG_LEVEL=4 in the agent's environment makes CRIU say more.",
    )
