"""Doctor's checks: what this machine must have, what it found, and what to do about the rest.

Facts are gathered by :mod:`quicferry.host.facts`; everything here judges and touches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from quicferry.host import machine
from quicferry.host.facts import Facts, gather

Level = Literal["required", "optional"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at; ``ok`` is None where it could not be told or does not matter yet."""

    name: str
    level: Level
    """Without an optional one something is lost, and ``why`` says what."""
    ok: bool | None
    found: str
    why: str
    fix: str


def checks(project: Path | None = None, *, nats_url: str | None = None) -> list[Check]:
    """Look at this machine and judge it; some seconds. ``project`` is the checkout, if there is one."""
    return judge(gather(project, nats_url=nats_url))


def judge(facts: Facts) -> list[Check]:
    """Every check, in the order in which to mend them."""
    return [check for rule in _RULES for check in rule(facts)]


def unfit(found: list[Check]) -> list[Check]:
    """The checks that must pass and did not."""
    return [check for check in found if check.level == "required" and check.ok is False]


CAPABILITIES: Final = {
    "DAC_OVERRIDE": 1,
    "KILL": 5,
    "NET_ADMIN": 12,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "CHECKPOINT_RESTORE": 40,
}
"""What podman and CRIU use, with their bits (capabilities(7))."""

OLDEST_KERNEL: Final = (5, 9)
"""CAP_CHECKPOINT_RESTORE and clone3 with set_tid in a container."""
OLDEST_CRIU: Final = (4, 2, 1)
OLDEST_PODMAN: Final = (4, 3)
OLDEST_COMPOSE: Final = (1, 3)
SERVER_PID: Final = 5_000
LAZY_PIPE_BYTES: Final = 4 * 1024 * 1024
ENOUGH_MEMORY: Final = 1024**3
ENOUGH_DISK: Final = 2 * 1024**3

_SETUP = "Run: make setup"


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version)) if version else "none"


def _root(facts: Facts) -> Iterator[Check]:
    missing = [name for name, bit in CAPABILITIES.items() if not facts.capabilities >> bit & 1]
    yield Check(
        name="root",
        level="required",
        ok=facts.euid == 0 and not missing,
        found=f"uid {facts.euid}" + (f", without {', '.join(missing)}" if missing else ""),
        why="Containers that move processes need root and its capabilities.",
        fix="Run it with sudo." if facts.euid else "Use a machine, or a container, with these capabilities.",
    )


def _kernel(facts: Facts) -> Iterator[Check]:
    yield Check(
        name="kernel",
        level="required",
        ok=facts.kernel >= OLDEST_KERNEL,
        found=_dotted(facts.kernel),
        why="Berths start a server at a PID of their choice by clone3 and CAP_CHECKPOINT_RESTORE.",
        fix=f"Use Linux {_dotted(OLDEST_KERNEL)} or later.",
    )
    yield Check(
        name="architecture",
        level="required",
        ok=facts.architecture in ("x86_64", "aarch64"),
        found=facts.architecture,
        why="CRIU and the wheels in the image are there for x86_64; aarch64 should work, others do not.",
        fix="Use an x86_64 machine.",
    )
    yield Check(
        name="checkpoint_restore",
        level="required",
        ok=facts.last_pid_control,
        found="in the kernel" if facts.last_pid_control else "not in the kernel",
        why="CRIU needs a kernel with CONFIG_CHECKPOINT_RESTORE.",
        fix="Use a kernel with it: every Debian kernel has it.",
    )
    yield Check(
        name="pid_max",
        level="required",
        ok=facts.pid_max > SERVER_PID,
        found=str(facts.pid_max),
        why=f"The server's PID is {SERVER_PID}, high enough to be free in every berth.",
        fix="sysctl -w kernel.pid_max=32768",
    )


def _podman(facts: Facts) -> Iterator[Check]:
    yield Check(
        name="podman",
        level="required",
        ok=facts.podman is not None and facts.podman >= OLDEST_PODMAN,
        found=_dotted(facts.podman),
        why="Berths are podman containers.",
        fix=_SETUP + ", or apt-get install podman.",
    )
    yield Check(
        name="podman_compose",
        level="required",
        ok=facts.compose is not None and facts.compose >= OLDEST_COMPOSE,
        found=_dotted(facts.compose),
        why="Older podman-compose silently ignores pid: host, init and profiles.",
        fix=_SETUP + ", or pip install 'podman-compose>=1.3'.",
    )
    yield Check(
        name="oci_runtime",
        level="required",
        ok="runc" in facts.runtimes or ("crun" in facts.runtimes and not facts.awkward.hybrid_cgroups),
        found=", ".join(facts.runtimes) or "none",
        why="podman starts containers with it; crun refuses hybrid cgroups, runc does not.",
        fix="apt-get install runc",
    )
    reasons = machine.reasons(facts.awkward)
    yield Check(
        name="containers_conf",
        level="required",
        ok=not reasons or facts.conf == "environment",
        found="; ".join(reasons) or ("ours is installed" if facts.conf == "installed" else "podman's own does"),
        why="podman's defaults do not start a container on every machine.",
        fix=f"{_SETUP}; by hand: export CONTAINERS_CONF=$PWD/{machine.CONF}",
    )


def _network(facts: Facts) -> Iterator[Check]:
    backend = facts.network_backend
    yield Check(
        name="network_backend",
        level="required",
        ok=None if backend is None else backend == "netavark" and set(facts.helpers) >= {"netavark", "aardvark-dns"},
        found=f"{backend or 'unknown'}, with {', '.join(facts.helpers) or 'no helper'}",
        why="Services find each other by name: netavark makes the network, aardvark-dns the names.",
        fix="apt-get install netavark aardvark-dns; if podman was used with CNI before: podman system reset "
        "(it removes all containers).",
    )
    yield Check(
        name="firewall_tool",
        level="required",
        ok=facts.iptables,
        found="there" if facts.iptables else "neither iptables nor nft",
        why="netavark publishes ports with it.",
        fix="apt-get install iptables",
    )
    yield Check(
        name="ports",
        level="required",
        ok=not facts.taken_ports,
        found="taken: " + ", ".join(facts.taken_ports)
        if facts.taken_ports
        else "in use by quicferry"
        if facts.up
        else "free",
        why="The berths and NATS are published on the loopback address.",
        fix="Choose others with the variables named, in the environment or in .env.",
    )


def _image(facts: Facts) -> Iterator[Check]:
    yield Check(
        name="image",
        level="required",
        ok=facts.image != "missing",
        found=facts.image,
        why="One image holds NATS, the services, the berths and CRIU.",
        fix=_SETUP + ", or quicferry up.",
    )
    yield Check(
        name="container",
        level="required",
        ok=False if facts.container_error else None if facts.criu is None else True,
        found=facts.container_error or ("a privileged one runs" if facts.criu else "not tried"),
        why="A privileged container on a bridge network must start.",
        fix=f"See what podman said; export CONTAINERS_CONF=$PWD/{machine.CONF} helps on unusual machines.",
    )


def _criu(facts: Facts) -> Iterator[Check]:
    criu = facts.criu
    version = tuple(int(part) for part in criu.version.split(".") if part.isdigit()) if criu else ()
    # 4.1.1 passes its own check on such kernels and then fails to dump any inet socket.
    yield Check(
        name="criu",
        level="required",
        ok=None if criu is None else version >= OLDEST_CRIU,
        found=criu.version or "does not start" if criu else "not tried",
        why="Older CRIU fails on new kernels: 3.17 on the vDSO, 4.1 on any inet socket from 6.16.",
        fix="Rebuild the image: quicferry clean, then make setup. Do not use the host's criu.",
    )
    said = criu.said.strip().splitlines() if criu else []
    yield Check(
        name="criu_check",
        level="required",
        ok=None if criu is None else criu.usable,
        found=(said[0] if said else "silent") if criu else "not tried",
        why="CRIU asks the kernel for everything that a dump and a restore need.",
        fix="The lines CRIU prints name what is missing: podman run --rm --privileged quicferry criu check -v4",
    )
    yield from (
        _feature(facts, "set_tid", "clone3_set_tid", "required", "Restored processes get their PIDs back by it."),
        _feature(
            facts,
            "dirty_tracking",
            "mem_dirty_track",
            "optional",
            "Without it there are no pre-copy rounds: moves work, large memory pauses longer.",
            "Use a kernel with CONFIG_MEM_SOFT_DIRTY, as Debian's own.",
        ),
        _feature(
            facts,
            "userfaultfd",
            "uffd-noncoop",
            "optional",
            "Without it there are no lazy pages: moves work, large memory pauses longer.",
            "Use a kernel with CONFIG_USERFAULTFD.",
        ),
        _feature(
            facts,
            "time_namespaces",
            "timens",
            "optional",
            "Without them the monotonic clock jumps on a move between hosts; on one host nothing is lost.",
            "Use a kernel with CONFIG_TIME_NS (5.6 or later).",
        ),
    )


def _feature(facts: Facts, name: str, feature: str, level: Level, why: str, fix: str = "") -> Check:
    there = facts.criu.features.get(feature) if facts.criu else None
    return Check(
        name=name,
        level=level,
        ok=there,
        found="not tried" if there is None else "there" if there else "not there",
        why=why,
        fix=fix or "Use a newer kernel.",
    )


def _resources(facts: Facts) -> Iterator[Check]:
    enough_pipe = facts.sys_resource or facts.pipe_max_bytes >= LAZY_PIPE_BYTES
    yield Check(
        name="pipe_size",
        level="optional",
        ok=enough_pipe,
        found=f"{facts.pipe_max_bytes} bytes, {'with' if facts.sys_resource else 'without'} CAP_SYS_RESOURCE",
        why="Lazy pages between hosts pass through pipes of 4 MiB.",
        fix=f"sysctl -w fs.pipe-max-size={LAZY_PIPE_BYTES}",
    )
    yield Check(
        name="memory",
        level="optional",
        ok=facts.memory_bytes >= ENOUGH_MEMORY,
        found=f"{facts.memory_bytes // 1024**2} MiB available",
        why="Images are kept in memory: a move needs the server's size once more.",
        fix="Free memory, or move smaller servers.",
    )
    yield Check(
        name="disk",
        level="required" if facts.image == "missing" else "optional",
        ok=facts.disk_bytes >= ENOUGH_DISK,
        found=f"{facts.disk_bytes // 1024**2} MiB free",
        why="The image and the event log need room.",
        fix="Free 2 GiB where podman stores its images, /var/lib/containers.",
    )
    yield Check(
        name="cpu",
        level="optional",
        ok=True,
        found="with AVX-512" if facts.cpu_avx512 else "without AVX-512",
        why="A process that uses AVX-512 cannot be restored on a host without it.",
        fix="Between hosts, move only among CPUs alike.",
    )


def _running(facts: Facts) -> Iterator[Check]:
    yield Check(
        name="pid_namespace",
        level="required",
        ok=facts.host_pid_namespace or None,
        found="the host's" if facts.host_pid_namespace else "a container's",
        why="Agents find a berth's processes by their PIDs on the host.",
        fix="Inside a container, give it pid: host; older podman-compose ignores that.",
    )
    yield Check(
        name="podman_service",
        level="required",
        ok=True if facts.podman_answers else False if facts.up else None,
        found=f"{'answers' if facts.podman_answers else 'no answer'} on {facts.podman_socket}",
        why="The agents find berths through podman's API; quicferry up starts it where nobody did.",
        fix="systemctl start podman.socket, or: podman system service --time=0 &",
    )
    yield Check(
        name="nats",
        level="required",
        ok=True if facts.nats_error is None else False if facts.up else None,
        found=f"{facts.nats}: {facts.nats_error or 'answers'}",
        why="Everything is said over NATS.",
        fix="quicferry up; NATS_URL names another server.",
    )


_RULES: Final[tuple[Callable[[Facts], Iterator[Check]], ...]] = (
    _root,
    _kernel,
    _podman,
    _network,
    _image,
    _criu,
    _resources,
    _running,
)
