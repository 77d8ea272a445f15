"""Where a client lets itself be sent, and addresses in their one form."""

from __future__ import annotations

import socket

import pytest

from quicferry.quic.addresses import Peer, for_family, normalised, shown
from quicferry.quic.policy import Policy

HOME: Peer = ("127.0.0.1", 4242)
AWAY: Peer = ("192.0.2.1", 4242)
LINK: Peer = ("fe80::1", 4242, 0, 3)


@pytest.mark.parametrize(
    ("host", "current", "target"),
    [
        ("192.0.2.7", AWAY, ("192.0.2.7", 99)),
        ("192.0.2.7", HOME, ("192.0.2.7", 99)),
        ("127.0.0.2", HOME, ("127.0.0.2", 99)),
        ("::1", HOME, ("::1", 99, 0, 0)),
        ("2001:DB8:0:0::7", AWAY, ("2001:db8::7", 99, 0, 0)),
        ("::ffff:192.0.2.7", AWAY, ("192.0.2.7", 99)),
        ("fe80::2", LINK, ("fe80::2", 99, 0, 3)),
        ("10.0.0.1", AWAY, ("10.0.0.1", 99)),
    ],
)
def test_allowed(host: str, current: Peer, target: Peer) -> None:
    assert Policy().resolve(host, 99, current) == target


@pytest.mark.parametrize(
    ("host", "current", "reason"),
    [
        ("0.0.0.0", HOME, "unspecified"),
        ("0.1.2.3", HOME, "unspecified"),
        ("::", HOME, "unspecified"),
        ("224.0.0.1", HOME, "multicast"),
        ("ff02::1", HOME, "multicast"),
        ("255.255.255.255", HOME, "broadcast"),
        ("240.0.0.1", AWAY, "reserved"),
        ("127.0.0.1", AWAY, "loopback"),
        ("::1", AWAY, "loopback"),
        ("::ffff:127.0.0.1", AWAY, "loopback"),
        ("::ffff:255.255.255.255", AWAY, "broadcast"),
        ("fe80::2", AWAY, "link-local"),
        ("example.org", HOME, "literal"),
        ("127.1", HOME, "literal"),
        ("1.2.3.4\n", HOME, "literal"),
        ("fe80::1%nonesuch0", HOME, "literal"),
    ],
)
def test_refused(host: str, current: Peer, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Policy().resolve(host, 99, current)


def test_only_these_networks() -> None:
    policy = Policy.only("192.0.2.0/24", "2001:db8::/32")
    assert policy.resolve("192.0.2.200", 1, AWAY) == ("192.0.2.200", 1)
    assert policy.resolve("2001:db8::5", 1, AWAY) == ("2001:db8::5", 1, 0, 0)
    for host in ("198.51.100.1", "2001:db9::1", "::ffff:198.51.100.1"):
        with pytest.raises(ValueError, match="not in the allowed networks"):
            policy.resolve(host, 1, AWAY)
    with pytest.raises(ValueError, match="loopback"):
        Policy.only("127.0.0.0/8").resolve("127.0.0.1", 1, AWAY)


def test_one_form_whatever_the_socket() -> None:
    assert normalised(("::ffff:192.0.2.1", 5, 0, 0)) == normalised(("192.0.2.1", 5)) == ("192.0.2.1", 5)
    assert for_family(("192.0.2.1", 5), socket.AF_INET6) == ("::ffff:192.0.2.1", 5, 0, 0)
    assert for_family(("192.0.2.1", 5), socket.AF_INET) == ("192.0.2.1", 5)
    with pytest.raises(OSError, match="IPv6"):
        for_family(("::1", 5, 0, 0), socket.AF_INET)
    assert (shown(("192.0.2.1", 5)), shown(("::1", 5, 0, 0))) == ("192.0.2.1:5", "[::1]:5")
