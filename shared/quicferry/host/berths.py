"""Berths: what podman knows of the containers that servers live in, and the labels that make them berths."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from quicferry.host import processes
from quicferry.protocol.api import Address
from quicferry.protocol.api import Berth as BerthRecord
from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import Name, Port

LABEL_BERTH: Final = "io.quicferry.berth"
LABEL_STACK: Final = "io.quicferry.stack"
"""Which copy of the system a berth belongs to, where a machine has several."""
LABEL_SERVICE: Final = "io.quicferry.service"
LABEL_PORT: Final = "io.quicferry.port"
LABEL_ADDRESS: Final = "io.quicferry.address"


class _Labels(msgspec.Struct, frozen=True):
    """The labels' values, checked."""

    berth: Name
    service: Name
    port: Port
    address: Address


class BerthFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A running container that is a berth."""

    name: str
    """The berth's name, from its label; unique on its node."""
    service: str
    port: int
    """The UDP port inside the berth."""
    address: Address
    """Where clients reach it."""
    container: str
    """The container's full id."""
    image: str
    """The image's full id."""
    init_pid: int
    """The PID of the berth's PID 1, in the host's PID namespace."""
    cgroup_path: str = ""
    """Below each hierarchy's root; empty if the container has no cgroup of its own or only a list was asked."""
    conmon_pid: int = 0
    """The PID of the container's monitor; 0 if only a list was asked."""

    def record(self, node: str) -> BerthRecord:
        """What the registry holds of it. Raises FerryError ``berth_gone`` if its init has exited."""
        server = processes.occupant(self.init_pid)
        if server is not None:
            server.close()
        return BerthRecord(
            node=node,
            berth=self.name,
            service=self.service,
            address=self.address,
            port=self.port,
            occupied=server is not None,
            container=self.container,
            image=self.image,
            seen_ms=time.time_ns() // 1_000_000,
        )


def facts(
    labels: dict[str, str],
    *,
    container: str,
    image: str,
    init_pid: int,
    cgroup_path: str = "",
    conmon_pid: int = 0,
) -> BerthFacts:
    """Read a berth's labels. Raises FerryError ``bad_request`` that names the label at fault."""
    address = labels.get(LABEL_ADDRESS, "")
    host, _, public = address.rpartition(":")
    raw = {
        "berth": labels.get(LABEL_BERTH, ""),
        "service": labels.get(LABEL_SERVICE, ""),
        "port": labels.get(LABEL_PORT, ""),
        "address": {"host": host.strip("[]"), "port": public},
    }
    try:
        checked = msgspec.convert(raw, _Labels, strict=False)
    except msgspec.ValidationError as error:
        raise FerryError(
            "bad_request",
            f"Container {container[:12]} is labelled as a berth, but wrongly: {error}.",
            hint=f"A berth has the labels {LABEL_BERTH}=NAME, {LABEL_SERVICE}=SERVICE, {LABEL_PORT}=4242 "
            f"and {LABEL_ADDRESS}=IP:PORT.",
        ) from None
    return BerthFacts(
        name=checked.berth,
        service=checked.service,
        port=checked.port,
        address=checked.address,
        container=container,
        image=image,
        init_pid=init_pid,
        cgroup_path=cgroup_path,
        conmon_pid=conmon_pid,
    )
