"""A UDP server with busy threads that holds by the library's own code: runs in a berth.

It answers each datagram with how often its busy thread has written to the heap. HEAP_DEAF=1 adds a thread that
blocks all signals, so that it can't be halted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading

from quicferry.protocol.errors import FerryError
from quicferry.quic import hold
from quicferry.quic.addresses import Peer
from quicferry.quic.migratable import MigratableUDP

PORT = 4242


class Busy(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.written = 0

    def run(self) -> None:
        while True:
            self.written += 1


def deaf() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    threading.Event().wait()


async def main() -> None:
    busy = Busy()
    busy.start()
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    if os.environ.get("HEAP_DEAF"):
        threading.Thread(target=deaf, daemon=True).start()

    def answer(_: bytes, peer: Peer) -> None:
        udp.sendto(b"%d" % busy.written, peer)

    def term() -> None:
        try:
            back = hold.hold(udp, "move-1")  # moves_by_hand.a_move's id
        except FerryError as error:
            print("refused", error.code, flush=True)
        else:
            print("adopted", back.adopted.outcome, flush=True)

    udp = MigratableUDP.bind("0.0.0.0", PORT, answer)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, term)
    print("serving", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
