"""Where a server may send its client: a client goes only where this allows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from quicferry.quic.addresses import Peer, normalised

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_CLASS_E: Final = ipaddress.ip_network("240.0.0.0/4")
_THIS_NETWORK: Final = ipaddress.ip_network("0.0.0.0/8")


@dataclass(frozen=True)
class Policy:
    """By default any unicast IP literal, a loopback one only from a loopback one."""

    allow: tuple[Network, ...] = ()
    """If given, the target lies in one of these."""

    @classmethod
    def only(cls, *networks: str) -> Policy:
        """A policy that allows these networks, as ``192.0.2.0/24``. Raises ValueError."""
        return cls(allow=tuple(ipaddress.ip_network(network) for network in networks))

    def resolve(self, host: str, port: int, current: Peer) -> Peer:
        """The target as a peer. Raises ValueError with the reason where it is not allowed."""
        try:
            target = normalised((host, port))
        except (ValueError, OSError):
            raise ValueError("not an IP address literal") from None
        ip, now = ipaddress.ip_address(target[0]), ipaddress.ip_address(current[0])
        if ip.is_unspecified or ip in _THIS_NETWORK:
            raise ValueError("the unspecified address")
        if ip.is_multicast:
            raise ValueError("a multicast address")
        if ip in _CLASS_E:
            raise ValueError("a broadcast or reserved address")
        if ip.is_loopback and not now.is_loopback:
            raise ValueError("a loopback address, and the server is not on this machine")
        if self.allow and not any(ip in network for network in self.allow):
            raise ValueError("not in the allowed networks")
        if len(target) == 4 and ip.is_link_local and target[3] == 0:
            if len(current) != 4 or not now.is_link_local:
                raise ValueError("a link-local address without a scope")
            return (target[0], target[1], 0, current[3])
        return target
