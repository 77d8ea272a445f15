"""Doctor's checks: both outcomes of each, from facts alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from quicferry.host import machine, preflight
from quicferry.host.facts import Facts, numbers
from quicferry.host.probe import FEATURES, Probe

ALL_CAPABILITIES = (1 << 41) - 1

GOOD_PODMAN = machine.Awkward(
    hybrid_cgroups=False,
    systemd=True,
    sys_resource=True,
    nofile_hard=1_048_576,
    runtime=None,
    crun_installed=True,
    cgroup_manager=None,
    ulimits_set=False,
)
GOOD_CRIU = Probe(version="4.2.1", usable=True, said="Looks good.", features=dict.fromkeys(FEATURES, True))
GOOD = Facts(
    euid=0,
    capabilities=ALL_CAPABILITIES,
    kernel=(6, 1, 0),
    architecture="x86_64",
    awkward=GOOD_PODMAN,
    conf="",
    podman=(4, 3, 1),
    network_backend="netavark",
    runtimes=("crun",),
    helpers=("netavark", "aardvark-dns"),
    iptables=True,
    podman_socket="/run/podman/podman.sock",
    podman_answers=True,
    compose=(1, 6, 0),
    image="current",
    container_error=None,
    criu=GOOD_CRIU,
    last_pid_control=True,
    pid_max=4_194_304,
    host_pid_namespace=True,
    pipe_max_bytes=1_048_576,
    sys_resource=True,
    cpu_avx512=True,
    memory_bytes=8 * 1024**3,
    disk_bytes=50 * 1024**3,
    up=True,
    taken_ports=(),
    nats="nats://127.0.0.1:4222",
    nats_error=None,
)


def change(**fields: Any) -> Facts:
    return msgspec.structs.replace(GOOD, **fields)


def criu(**fields: Any) -> Facts:
    return change(criu=msgspec.structs.replace(GOOD_CRIU, **fields))


def awkward(**fields: Any) -> Facts:
    return change(awkward=msgspec.structs.replace(GOOD_PODMAN, **fields))


def check(facts: Facts, name: str) -> preflight.Check:
    (found,) = [item for item in preflight.judge(facts) if item.name == name]
    return found


def without(feature: str) -> Facts:
    return criu(features={**GOOD_CRIU.features, feature: False})


BAD: list[tuple[str, Facts, str]] = [
    ("root", change(euid=1000), "sudo"),
    ("root", change(capabilities=ALL_CAPABILITIES & ~(1 << 21)), "capabilities"),
    ("kernel", change(kernel=(5, 4, 0)), "5.9"),
    ("architecture", change(architecture="riscv64"), "x86_64"),
    ("checkpoint_restore", change(last_pid_control=False), "kernel"),
    ("pid_max", change(pid_max=4096), "sysctl"),
    ("podman", change(podman=None), "make setup"),
    ("podman", change(podman=(3, 0, 1)), "make setup"),
    ("podman_compose", change(compose=(1, 0, 3)), "1.3"),
    ("podman_compose", change(compose=None), "make setup"),
    ("oci_runtime", change(runtimes=()), "runc"),
    ("oci_runtime", awkward(hybrid_cgroups=True), "runc"),
    ("containers_conf", awkward(hybrid_cgroups=True), "CONTAINERS_CONF"),
    ("containers_conf", awkward(systemd=False), "CONTAINERS_CONF"),
    ("containers_conf", awkward(sys_resource=False, nofile_hard=1024), "CONTAINERS_CONF"),
    ("network_backend", change(network_backend="cni"), "netavark"),
    ("network_backend", change(helpers=("netavark",)), "aardvark-dns"),
    ("firewall_tool", change(iptables=False), "iptables"),
    ("ports", change(taken_ports=("14242/udp (SRC_PORT)",)), ".env"),
    ("image", change(image="missing", criu=None), "make setup"),
    ("container", change(container_error="error setting rlimits", criu=None), "CONTAINERS_CONF"),
    ("criu", criu(version="4.1.1"), "Rebuild"),
    ("criu", criu(version=""), "Rebuild"),
    ("criu_check", criu(usable=False, said="Error: no ptrace"), "criu check"),
    ("set_tid", without("clone3_set_tid"), "kernel"),
    ("dirty_tracking", without("mem_dirty_track"), "CONFIG_MEM_SOFT_DIRTY"),
    ("userfaultfd", without("uffd-noncoop"), "CONFIG_USERFAULTFD"),
    ("time_namespaces", without("timens"), "CONFIG_TIME_NS"),
    ("pipe_size", change(sys_resource=False), "fs.pipe-max-size"),
    ("memory", change(memory_bytes=10), "memory"),
    ("disk", change(disk_bytes=10), "2 GiB"),
    ("podman_service", change(podman_answers=False), "podman.socket"),
    ("nats", change(nats_error="Connection refused"), "quicferry up"),
]


def test_a_good_machine_passes_every_check() -> None:
    found = preflight.judge(GOOD)
    assert [item.name for item in found if item.ok is not True] == []
    assert preflight.unfit(found) == []


@pytest.mark.parametrize(("name", "facts", "fix"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_each_trap_is_found_and_the_fix_is_told(name: str, facts: Facts, fix: str) -> None:
    found = check(facts, name)
    assert found.ok is False
    assert fix in found.fix
    assert found.why
    assert found.found
    assert (found in preflight.unfit(preflight.judge(facts))) is (found.level == "required")


def test_every_check_but_the_notes_has_its_bad_case_here() -> None:
    names = {item.name for item in preflight.judge(GOOD)}
    # Neither is ever bad by itself: the CPU is a note, and inside a container only an agent can tell.
    assert names - {name for name, _, _ in BAD} == {"cpu", "pid_namespace"}


def test_names_are_unique() -> None:
    names = [item.name for item in preflight.judge(GOOD)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["container", "criu", "criu_check", "set_tid", "dirty_tracking"])
def test_what_could_not_be_tried_is_neither_good_nor_bad(name: str) -> None:
    assert check(change(criu=None, image="missing"), name).ok is None


@pytest.mark.parametrize("name", ["podman_service", "nats"])
def test_what_up_would_start_is_not_missed_before(name: str) -> None:
    assert check(change(up=False, podman_answers=False, nats_error="refused"), name).ok is None


def test_hybrid_cgroups_are_fine_with_runc_and_our_configuration() -> None:
    facts = msgspec.structs.replace(
        awkward(hybrid_cgroups=True, runtime="runc", systemd=False, cgroup_manager="cgroupfs"), runtimes=("runc",)
    )
    assert check(facts, "oci_runtime").ok is True
    assert check(facts, "containers_conf").ok is True


def test_the_environment_may_bring_the_configuration() -> None:
    facts = msgspec.structs.replace(awkward(hybrid_cgroups=True), conf="environment")
    assert check(facts, "containers_conf").ok is True


def test_limits_that_need_no_raising_are_fine_without_the_capability() -> None:
    assert machine.reasons(msgspec.structs.replace(GOOD_PODMAN, sys_resource=False)) == []
    assert machine.reasons(msgspec.structs.replace(GOOD_PODMAN, sys_resource=False, nofile_hard=1024)) != []
    assert (
        machine.reasons(msgspec.structs.replace(GOOD_PODMAN, sys_resource=False, nofile_hard=1024, ulimits_set=True))
        == []
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6.18.44-custom", (6, 18, 44)), ("6.1", (6, 1)), ("4.3.1+ds1", (4, 3, 1)), ("next", None)],
)
def test_version_numbers(text: str, expected: tuple[int, ...] | None) -> None:
    assert numbers(text) == expected
