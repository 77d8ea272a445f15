"""What the preflight looks at: facts about this machine, gathered without judging them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from quicferry.host import image, inventory, machine, podman_service, probe, processes
from quicferry.host.command import attempt
from quicferry.protocol.errors import FerryError

HELPERS = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/lib/podman", "/usr/local/libexec/podman")
"""Where netavark and aardvark-dns live."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """None where a fact could not be learned, usually because something before it is missing."""

    euid: int
    capabilities: int
    kernel: tuple[int, ...]
    architecture: str
    awkward: machine.Awkward
    conf: str
    """Where our containers.conf is in effect: ``installed``, ``environment`` or empty."""
    podman: tuple[int, ...] | None
    network_backend: str | None
    runtimes: tuple[str, ...]
    """Of runc and crun, those installed."""
    helpers: tuple[str, ...]
    """Of netavark and aardvark-dns, those installed."""
    iptables: bool
    podman_socket: str
    podman_answers: bool
    compose: tuple[int, ...] | None
    image: str
    """``current``, ``stale``, ``missing`` or, outside a checkout, ``unknown``."""
    container_error: str | None
    """What a container that was to run CRIU's checks ended with; None if it ran or could not be tried."""
    criu: probe.Probe | None
    last_pid_control: bool
    """/proc/sys/kernel/ns_last_pid is there: CONFIG_CHECKPOINT_RESTORE."""
    pid_max: int
    host_pid_namespace: bool
    pipe_max_bytes: int
    sys_resource: bool
    cpu_avx512: bool
    memory_bytes: int
    """Available, as of proc_meminfo(5)."""
    disk_bytes: int
    """Free where podman stores its images."""
    up: bool
    """Our containers are there."""
    taken_ports: tuple[str, ...]
    """``14242/udp`` and so on, of those we publish, taken by others."""
    nats: str
    nats_error: str | None
    """Why NATS does not answer at ``nats``; None if it does."""


def gather(project: Path | None = None, *, nats_url: str | None = None) -> Facts:
    """Look at everything; some seconds at most. Runs one short-lived container if the image is here."""
    env = machine.environment(project)
    podman, backend = _podman(env)
    ours = _ours(podman is not None, env)
    state = _image_state(project) if podman else "missing"
    criu, container_error = _probe(env) if state != "missing" and os.geteuid() == 0 else (None, None)
    capabilities = machine.effective_capabilities()
    nats = nats_url or os.environ.get("NATS_URL") or f"nats://127.0.0.1:{os.environ.get('NATS_PORT') or 4222}"
    return Facts(
        euid=os.geteuid(),
        capabilities=capabilities,
        kernel=numbers(platform.release()) or (0,),
        architecture=platform.machine(),
        awkward=machine.look(),
        conf="environment" if env else "installed" if machine.INSTALLED.exists() else "",
        podman=podman,
        network_backend=backend,
        runtimes=tuple(name for name in ("runc", "crun") if shutil.which(name)),
        helpers=tuple(
            name
            for name in ("netavark", "aardvark-dns")
            if shutil.which(name) or any(Path(folder, name).exists() for folder in HELPERS)
        ),
        iptables=shutil.which("iptables") is not None or shutil.which("nft") is not None,
        podman_socket=str(podman_service.socket_path()),
        podman_answers=podman_service.answers(podman_service.socket_path()),
        compose=_compose_version(),
        image=state,
        container_error=container_error,
        criu=criu,
        last_pid_control=Path("/proc/sys/kernel/ns_last_pid").exists(),
        pid_max=_number("/proc/sys/kernel/pid_max"),
        host_pid_namespace=processes.in_host_pid_namespace(),
        pipe_max_bytes=_number("/proc/sys/fs/pipe-max-size"),
        sys_resource=bool(capabilities >> machine.CAP_SYS_RESOURCE & 1),
        cpu_avx512="avx512" in _read("/proc/cpuinfo"),
        memory_bytes=_available_memory(),
        disk_bytes=_free_disk(),
        up=bool(ours),
        taken_ports=() if ours else _taken_ports(),
        nats=nats,
        nats_error=_nats_error(nats),
    )


def numbers(version: str) -> tuple[int, ...] | None:
    """``6.18.44-custom`` as (6, 18, 44); None if it does not begin with numbers."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    return tuple(int(part) for part in match.groups() if part is not None) if match else None


def _podman(env: dict[str, str]) -> tuple[tuple[int, ...] | None, str | None]:
    told = attempt(["podman", "--version"], timeout=30).out.split()
    version = numbers(told[-1]) if told else None
    if version is None:
        return None, None
    backend = attempt(["podman", "info", "--format", "{{.Host.NetworkBackend}}"], timeout=30, env=env)
    return version, backend.out.strip() or None


def _ours(podman: bool, env: dict[str, str]) -> list[inventory.Container]:
    try:
        return inventory.containers(None, env) if podman else []
    except FerryError:
        return []  # the checks of podman itself say why


def _image_state(project: Path | None) -> str:
    inputs = image.built_inputs()
    if inputs is None:
        return "missing"
    if project is None:
        return "unknown"
    return "current" if image.is_current(project) else "stale"


def _probe(env: dict[str, str]) -> tuple[probe.Probe | None, str | None]:
    """Start a container the way ours are, on a bridge, and let CRIU look at the kernel from in there."""
    result = attempt(
        [
            *("podman", "run", "--rm", "--privileged", "--pull", "never", "--tmpfs", "/run"),
            *("--label", f"{inventory.OURS}.probe=1"),
            *(image.IMAGE, "python", "-m", "quicferry.host.probe"),
        ],
        timeout=120,
        env=env,
    )
    try:
        return msgspec.json.decode(result.out, type=probe.Probe), None
    except msgspec.DecodeError:
        return None, result.output[-500:] or f"podman ended with {result.code}"


def _compose_version() -> tuple[int, ...] | None:
    try:
        return inventory.compose_version(inventory.podman_compose()[0])
    except FerryError:
        found = shutil.which("podman-compose")
        return inventory.compose_version(found) if found else None


def _taken_ports() -> tuple[str, ...]:
    """Of the ports that compose.yaml publishes, those that cannot be bound."""
    taken = []
    for variable, default, kind, protocol in (
        ("SRC_PORT", 14242, socket.SOCK_DGRAM, "udp"),
        ("DST_PORT", 14243, socket.SOCK_DGRAM, "udp"),
        ("NATS_PORT", 4222, socket.SOCK_STREAM, "tcp"),
    ):
        told = os.environ.get(variable) or str(default)
        with socket.socket(socket.AF_INET, kind) as probe_socket:
            if kind == socket.SOCK_STREAM:
                probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe_socket.bind(("127.0.0.1", int(told)))
            except (OSError, ValueError, OverflowError):
                taken.append(f"{told}/{protocol} ({variable})")
    return tuple(taken)


def _nats_error(url: str) -> str | None:
    """A NATS server speaks first, ``INFO {…}`` (NATS client protocol); None if one did."""
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 4222), timeout=2) as peer:
            peer.settimeout(2)
            greeting = peer.recv(16)
    except (OSError, ValueError) as error:
        return str(error)
    return None if greeting.startswith(b"INFO ") else "something else answers there"


def _free_disk() -> int:
    for folder in ("/var/lib/containers", "/var/lib", "/"):
        if Path(folder).exists():
            return shutil.disk_usage(folder).free
    return 0


def _available_memory() -> int:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _number(path: str) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else 0
