"""Standing still: until SIGUSR2 comes nothing of the process runs, and with a shared heap nothing touches it.

The shared heap (containers/heap/heap.c) is mapped by the frozen source and by its restored copy at once, so
whichever of them an accident lets go must not write to it. Its library waits in C, with all threads halted.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from typing import Any, Final

from quicferry.protocol.errors import FerryError

WAKE: Final = signal.SIGUSR2
STOP: Final = signal.SIGTERM
LIBRARY: Final = "libquicferry-heap.so"
LOOK_EVERY: Final = 0.005
"""Seconds between looks for a signal that another thread may have taken."""


def _c_function() -> Any:
    if LIBRARY not in os.environ.get("LD_PRELOAD", ""):
        return None
    import ctypes  # only here: without the heap it would be memory to carry for nothing

    # PyDLL keeps the interpreter's lock, so no thread is halted while it runs Python code.
    return getattr(ctypes.PyDLL(None), "quicferry_stand_still", None)


_stand_still: Final = _c_function()


class Stillness:
    """Waits for WAKE; make it where it and STOP have just been blocked, as a context manager.

    A signal to the process goes to any thread that does not block it (signal(7)). Without the library Python
    notes it in the wake-up descriptor, which for the time being is a pipe of ours.
    """

    def __enter__(self) -> Stillness:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._read)
        os.close(self._write)

    def wait(self, *closing: socket.socket) -> None:
        """Close the sockets, in order, and return when WAKE came; STOP ends the process.

        Raises FerryError ``hold_refused``, with the sockets still open, if a thread can't be halted.
        """
        if _stand_still is not None:
            self._wait_in_c(closing)
            return
        for sock in closing:
            sock.close()
        if self._signal() == STOP:
            # Our connections belong to another copy, or to nobody: nothing here may say goodbye for them.
            os._exit(0)

    def _signal(self) -> int:
        if threading.active_count() == 1:
            return signal.sigwaitinfo({WAKE, STOP}).si_signo
        while True:
            if (info := signal.sigtimedwait({WAKE, STOP}, LOOK_EVERY)) is not None:
                return info.si_signo
            if select.select([self._read], [], [], 0)[0]:
                for number in os.read(self._read, 64):
                    if number in (WAKE, STOP):
                        return number

    def _wait_in_c(self, closing: tuple[socket.socket, ...]) -> None:
        import ctypes

        fds = (ctypes.c_int * len(closing))(*(sock.fileno() for sock in closing))
        if _stand_still(fds, len(fds), int(WAKE), int(STOP)):
            raise FerryError(
                "hold_refused",
                "A thread of the server can't be halted: it blocks all signals, or there are thousands.",
                hint="Let it accept signals, or run the server with QUICFERRY_HEAP=private.",
            )
        for sock in closing:
            sock.detach()
