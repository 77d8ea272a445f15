"""Sockets of the wrappers: a port belongs to one of them."""

from __future__ import annotations

import contextlib

import pytest

from quicferry.quic.addresses import open_socket
from quicferry.quic.migratable import MigratableUDP
from quicferry.quic.swappable import open_client_socket


def test_no_two_clients_get_the_same_port() -> None:
    """With SO_REUSEADDR the kernel gave out ports twice: among 500 clients about four got no answer ever."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(open_client_socket(("127.0.0.1", 4242))).getsockname()[1] for _ in range(700)]
    assert len(set(ports)) == len(ports)


def test_a_port_in_use_is_refused() -> None:
    with open_socket(("127.0.0.1", 0), receive_buffer=65_536) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            open_socket(("127.0.0.1", port), receive_buffer=65_536)


async def test_a_second_server_on_a_port_is_refused_and_a_rebind_is_not() -> None:
    first = MigratableUDP.bind("127.0.0.1", 0, lambda data, peer: None)
    with pytest.raises(OSError, match="in use"):
        MigratableUDP.bind("127.0.0.1", first.port, lambda data, peer: None)
    first.rebind()
    with pytest.raises(OSError, match="in use"):
        MigratableUDP.bind("127.0.0.1", first.port, lambda data, peer: None)
    first.close()
