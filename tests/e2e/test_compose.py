"""compose.yaml for real: everything runs, names resolve, down and clean leave nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml

from quicferry.host import compose, image, inventory, podman_service
from quicferry.host.command import attempt, run
from quicferry.host.compose import Stack

PROJECT = Path(__file__).resolve().parents[2]


def read_compose() -> dict[str, dict[str, dict[str, object]]]:
    with (PROJECT / "compose.yaml").open() as file:
        loaded: dict[str, dict[str, dict[str, object]]] = yaml.safe_load(file)
    return loaded


def container(stack: Stack, service: str) -> str:
    (found,) = [item.id for item in stack.containers() if item.service == service]
    return found


def inside(stack: Stack, service: str, *command: str) -> str:
    return run(
        ["podman", "exec", container(stack, service), *command],
        timeout=30,
        doing=f"running {command[0]} in {service}",
        env=stack.environment,
    )


def test_the_code_knows_every_service_that_up_starts() -> None:
    services = read_compose()["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == set(compose.SERVICES)


def test_everything_of_ours_is_labelled() -> None:
    read = read_compose()
    for section in ("services", "networks", "volumes"):
        for name, entry in read[section].items():
            labels = entry["labels"]
            assert isinstance(labels, dict), name
            assert labels["io.quicferry"] == "1", name


def test_both_berths_are_alike_but_for_their_names_ports_and_first_server() -> None:
    services = read_compose()["services"]
    a, b = ({**services[name]} for name in ("berth-a", "berth-b"))
    for berth in (a, b):
        for own in ("labels", "ports"):
            berth.pop(own)
    assert a.pop("command") is not None
    assert a == b


def test_every_service_runs_and_none_had_to_start_twice(stack: Stack) -> None:
    there = stack.containers()
    assert {item.service for item in there if item.state == "running"} == set(compose.SERVICES)
    counts = run(
        ["podman", "inspect", "--format", "{{.RestartCount}}", *(item.id for item in there)],
        timeout=30,
        doing="inspecting",
        env=stack.environment,
    )
    assert set(counts.split()) == {"0"}


def test_names_resolve_between_the_services(stack: Stack) -> None:
    assert inside(stack, "berth-b", "getent", "hosts", "nats").strip()


def test_agents_see_the_hosts_processes_podman_and_the_images_in_memory(stack: Stack) -> None:
    for agent in ("checkpoint-agent", "restore-agent"):
        host = Path("/proc/1/cmdline").read_bytes().replace(b"\0", b" ").decode()
        assert inside(stack, agent, "cat", "/proc/1/cmdline").replace("\0", " ") == host
        assert "podman.sock" in inside(stack, agent, "ls", "/run/podman")
        told = inside(stack, agent, "stat", "--file-system", "--format", "%T", "/var/lib/quicferry/images")
        assert told.strip() == "tmpfs"
        assert inside(stack, agent, "stat", "--format", "%a", "/var/lib/quicferry/images").strip() == "700"


def test_the_server_is_in_one_berth_at_its_pid(stack: Stack) -> None:
    """Berth a at first; tests before this one may have moved it."""
    found = [
        attempt(
            ["podman", "exec", container(stack, berth), "cat", "/proc/5000/cmdline"],
            timeout=30,
            env=stack.environment,
        ).out
        for berth in ("berth-a", "berth-b")
    ]
    assert ["echo_server" in command for command in found].count(True) == 1
    assert "" in found


def test_nats_is_published_on_the_loopback_port(stack: Stack, stack_variables: dict[str, str]) -> None:
    with socket.create_connection(("127.0.0.1", int(stack_variables["NATS_PORT"])), timeout=5) as peer:
        assert peer.recv(5) == b"INFO "


def test_up_again_replaces_nothing(stack: Stack) -> None:
    before, built = {item.id for item in stack.containers()}, image.image_id()
    after = {item.id for item in stack.up()}
    # Someone who edits the sources while tests run gets a new image, and then new containers, rightly.
    assert after == before or image.image_id() != built


def test_a_taken_port_is_told_and_nothing_is_left_half_done(podman_api: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        ports = {"NATS_PORT": str(holder.getsockname()[1]), "SRC_PORT": "0", "DST_PORT": "0"}
        for name in ("SRC_PORT", "DST_PORT"):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.bind(("127.0.0.1", 0))
                ports[name] = str(probe.getsockname()[1])
        other = Stack(PROJECT, name="quicferry-e2e-taken", variables=ports)
        with pytest.raises(compose.FerryError) as error:
            other.up(timeout=5)
    assert error.value.code == "setup_failed"
    assert "NATS_PORT" in error.value.hint
    assert other.containers() == []
    other.down(volumes=True)


def test_down_leaves_the_volumes_and_clean_leaves_nothing(podman_api: str, stack_variables: dict[str, str]) -> None:
    ports = {name: str(_free(name)) for name in stack_variables}
    other = Stack(PROJECT, name="quicferry-e2e-down", variables=ports)
    try:
        other.up()
        assert other.down() == len(compose.SERVICES)
        assert other.containers() == []
        assert inventory.named("network", other.name, other.environment) == []
        assert len(inventory.named("volume", other.name, other.environment)) == 3
        assert other.name in compose.remembered(PROJECT)
    finally:
        other.clean(images=False)
    assert other.name not in compose.remembered(PROJECT)
    assert inventory.named("volume", other.name, other.environment) == []


def test_up_replaces_what_podman_wrongly_takes_for_running(podman_api: str, stack_variables: dict[str, str]) -> None:
    other = Stack(PROJECT, name="quicferry-e2e-gone", variables={name: str(_free(name)) for name in stack_variables})
    try:
        before = other.up()
        killed = [item for item in before if item.service in ("nats", "berth-a", "coordinator")]
        for item in killed:
            pids = run(
                ["podman", "inspect", "--format", "{{.State.ConmonPid}} {{.State.Pid}}", item.id],
                timeout=30,
                doing="asking for PIDs",
                env=other.environment,
            )
            for pid in pids.split():  # conmon first: nobody tells podman of the container's end
                os.kill(int(pid), signal.SIGKILL)
        deadline = time.monotonic() + 30
        while {item.id for item in other.containers() if item.state == "gone"} != {item.id for item in killed}:
            assert time.monotonic() < deadline, other.containers()
            time.sleep(0.1)  # podman does not know of their end, so nothing tells of it
        after = other.up()
        assert {item.service: item.state for item in after} == dict.fromkeys(compose.SERVICES, "running")
        assert {item.id for item in before} - {item.id for item in after} >= {item.id for item in killed}
    finally:
        other.clean(images=False)


def _free(name: str) -> int:
    kind = socket.SOCK_STREAM if name == "NATS_PORT" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_podmans_service_starts_where_none_answers_and_stops(
    built_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(podman_service.DIRECTORY_VARIABLE, str(tmp_path))
    path = podman_service.socket_path()
    assert not podman_service.answers(path)
    assert podman_service.ensure(Stack(PROJECT).environment)
    assert podman_service.answers(path)
    assert not podman_service.ensure({})  # the one that answers is used
    assert podman_service.stop_own()
    assert not path.exists()
    assert not podman_service.stop_own()
