"""Fixtures of the tests that move real processes: root, podman, the image, and a whole system of their own."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from quicferry.host import image, podman_service
from quicferry.host.compose import Stack
from quicferry.host.podman import Podman
from tests.e2e.berths import Harbour, client_of, harbour

PROJECT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


def free_port(kind: int) -> int:
    """A port that is free now; another process could still take it, which the test's failure would tell."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session", autouse=True)
def built_image() -> str:
    """The image's name, built first if its inputs changed."""
    if os.environ.get("QUICFERRY_TEST_IMAGE"):
        return os.environ["QUICFERRY_TEST_IMAGE"]
    if os.geteuid() != 0:
        pytest.skip("root is missing: containers that move processes need it")
    for program in ("podman", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: make setup installs it")
    image.build(PROJECT)
    return image.IMAGE


@pytest.fixture(scope="session")
def podman_api(built_image: str) -> Iterator[str]:
    """The URL of a podman service of this session's own: another's could be stopped under it."""
    before = os.environ.get(podman_service.DIRECTORY_VARIABLE)
    os.environ[podman_service.DIRECTORY_VARIABLE] = f"/run/quicferry-e2e-{os.getpid()}"
    try:
        podman_service.ensure(Stack(PROJECT).environment)
        yield f"unix://{podman_service.socket_path()}"
    finally:
        podman_service.stop_own()
        shutil.rmtree(podman_service.directory(), ignore_errors=True)
        os.environ.pop(podman_service.DIRECTORY_VARIABLE)
        if before is not None:
            os.environ[podman_service.DIRECTORY_VARIABLE] = before


@pytest.fixture(scope="session")
def stack_variables() -> dict[str, str]:
    """Ports of the tests' own system, so that it runs beside another."""
    return {
        "SRC_PORT": str(free_port(socket.SOCK_DGRAM)),
        "DST_PORT": str(free_port(socket.SOCK_DGRAM)),
        "NATS_PORT": str(free_port(socket.SOCK_STREAM)),
    }


@pytest.fixture(scope="session")
def stack(podman_api: str, stack_variables: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The whole system of compose.yaml, up; its containers, network and volumes go at the session's end."""
    ours = Stack(PROJECT, name=f"quicferry-e2e-{os.getpid()}", variables=stack_variables)
    try:
        ours.up()
        yield ours
    finally:
        if request.session.testsfailed:  # what the services said is gone with them
            for item in ours.containers():
                print(f"--- {item.service} ({item.state})\n{ours.logs(item.service, lines=60)}")
        ours.down(volumes=True)


@pytest_asyncio.fixture
async def port(tmp_path: Path) -> AsyncIterator[Harbour]:
    async with harbour(tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def podman(port: Harbour) -> AsyncIterator[Podman]:
    client = client_of(port)
    yield client
    client.close()
