"""A UDP echo server that holds and adopts as the server wrapper does: standard library only, runs in a berth.

It answers each datagram with a running number, its PID and the datagram: a number that goes on after a move
shows that the process was moved, not started. ECHO_BALLAST_MIB makes it larger; ECHO_STUBBORN=1 makes it ignore
SIGTERM; ECHO_EXIT=1 makes it exit on SIGTERM, as a server that is not armed does; ECHO_CHILD=1 makes it start a
program with a few megabytes of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

PORT = 4242
AGENT = f"\0quicferry.parking.{PORT}"


class Echo:
    def __init__(self) -> None:
        self.count = 0
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.udp.bind(("0.0.0.0", PORT))
        self.ballast = os.urandom(int(os.environ.get("ECHO_BALLAST_MIB", "0")) << 20)

    def readable(self) -> None:
        while True:
            try:
                data, peer = self.udp.recvfrom(2048)
            except BlockingIOError:
                return
            self.count += 1
            self.udp.sendto(f"{self.count} {os.getpid()} ".encode() + data, peer)

    def term(self) -> None:
        if os.environ.get("ECHO_STUBBORN"):
            print("stubborn", flush=True)
            return
        if os.environ.get("ECHO_EXIT"):
            raise SystemExit(0)
        loop = asyncio.get_running_loop()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
        loop.remove_reader(self.udp)
        print("holding", flush=True)
        self._park()
        answer = self._adopt()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
        loop.add_reader(self.udp, self.readable)
        print("adopted", answer["outcome"], answer["berth"], answer["epoch"], flush=True)
        self.readable()

    def _park(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
            unix.connect(AGENT)
            socket.send_fds(unix, [b'{"op":"park"}\n'], [self.udp.fileno()])
            _stand_still(self.udp, unix)

    def _adopt(self) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
            unix.connect(AGENT)
            unix.sendall(b'{"op":"adopt"}\n')
            line, fds, _, _ = socket.recv_fds(unix, 4096, 1)
        self.udp = socket.socket(fileno=fds[0])
        self.udp.setblocking(False)
        answer: dict[str, Any] = json.loads(line)
        return answer


def _stand_still(*closing: socket.socket) -> None:
    """Without a touch of the heap, if that is shared (containers/heap/heap.c): another copy may have it too."""
    in_c = getattr(ctypes.PyDLL(None), "quicferry_stand_still", None)
    if in_c is not None:
        fds = (ctypes.c_int * len(closing))(*(sock.fileno() for sock in closing))
        if in_c(fds, len(fds), int(signal.SIGUSR2), int(signal.SIGTERM)):
            raise SystemExit("a thread can't be halted")
        for sock in closing:
            sock.detach()
        return
    for sock in closing:
        sock.close()
    if signal.sigwaitinfo({signal.SIGUSR2, signal.SIGTERM}).si_signo == signal.SIGTERM:
        raise SystemExit(0)


PROGRAM = "import os, time; kept = os.urandom(8 << 20); print(); os.close(1); time.sleep(3600)"


def start_program() -> None:
    null = subprocess.DEVNULL
    program = subprocess.Popen([sys.executable, "-uc", PROGRAM], stdin=null, stdout=subprocess.PIPE, stderr=null)
    assert program.stdout is not None
    with program.stdout as said:
        said.read()


async def main() -> None:
    echo = Echo()
    loop = asyncio.get_running_loop()
    loop.add_reader(echo.udp, echo.readable)
    loop.add_signal_handler(signal.SIGTERM, echo.term)
    print("serving", os.getpid(), flush=True)
    await asyncio.Event().wait()


if os.environ.get("ECHO_CHILD"):
    start_program()
asyncio.run(main())
