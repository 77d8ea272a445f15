"""A UDP relay that loses, duplicates and reorders, the same way each time for the same seed."""

from __future__ import annotations

import asyncio
import random
import socket
from dataclasses import dataclass
from typing import Any


@dataclass
class Weather:
    """Chances of each mishap for one datagram."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class Relay:
    """Clients dial :attr:`port`; each gets a socket of its own towards the server, as behind a NAT."""

    def __init__(self, server: tuple[str, int], weather: Weather, seed: int) -> None:
        self.server = server
        self.weather = weather
        self.dropped = self.duplicated = self.reordered = self.passed = 0
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._front = self._open()
        self._front.bind(("127.0.0.1", 0))
        self.port: int = self._front.getsockname()[1]
        self._back: dict[Any, socket.socket] = {}
        self._loop.add_reader(self._front, self._from_client)

    async def __aenter__(self) -> Relay:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sock in (self._front, *self._back.values()):
            self._loop.remove_reader(sock)
            sock.close()

    @staticmethod
    def _open() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        return sock

    def _from_client(self) -> None:
        while (got := _receive(self._front)) is not None:
            data, client = got
            if client not in self._back:
                back = self._back[client] = self._open()
                back.bind(("127.0.0.1", 0))
                self._loop.add_reader(back, self._from_server, back, client)
            self._pass(self._back[client], data, self.server)

    def _from_server(self, back: socket.socket, client: Any) -> None:
        while (got := _receive(back)) is not None:
            self._pass(self._front, got[0], client)

    def _pass(self, sock: socket.socket, data: bytes, to: Any) -> None:
        dice, weather = self._random.random, self.weather
        if dice() < weather.loss:
            self.dropped += 1
            return
        copies = 2 if dice() < weather.duplicate else 1
        self.duplicated += copies - 1
        for _ in range(copies):
            if dice() < weather.reorder:
                self.reordered += 1
                self._loop.call_later(0.002 + 0.008 * dice(), self._send, sock, data, to)
            else:
                self._send(sock, data, to)

    def _send(self, sock: socket.socket, data: bytes, to: Any) -> None:
        try:
            sock.sendto(data, to)
            self.passed += 1
        except OSError:  # closed, or its queue is full: one loss more
            self.dropped += 1


def _receive(sock: socket.socket) -> tuple[bytes, Any] | None:
    try:
        return sock.recvfrom(65_535)
    except OSError:  # nothing there, or an ICMP error that stands for a lost datagram
        return None
