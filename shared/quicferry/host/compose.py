"""The whole system up, down and away, through podman-compose and podman; by label, nothing else is touched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from quicferry.host import image, inventory, machine, podman_service
from quicferry.host.command import KEPT_CHARACTERS, attempt, run
from quicferry.protocol.errors import FerryError

DEFAULT_NAME: Final = "quicferry"
NAME_VARIABLE: Final = "COMPOSE_PROJECT_NAME"

SERVICES: Final = ("nats", "coordinator", "checkpoint-agent", "restore-agent", "berth-a", "berth-b")
"""What `up` starts, as compose.yaml has it; a test compares."""

STARTED: Final = ".cache/started"

UP_TIMEOUT: Final = 120.0
STOP_GRACE: Final = 8
"""Seconds for a container to end by itself, as compose.yaml's stop_grace_period."""

Say = Callable[[str], None]


def _quiet(_: str) -> None:
    """Tells nobody."""


class Stack:
    """One copy of the system: a checkout, and the name that tells it from other copies on the machine.

    ``variables`` are those of compose.yaml (ports, node name); they are added to the environment.
    """

    def __init__(
        self,
        project: Path,
        *,
        name: str | None = None,
        variables: Mapping[str, str] | None = None,
        say: Say = _quiet,
    ) -> None:
        self.project = project.resolve()
        self.name = name or os.environ.get(NAME_VARIABLE) or DEFAULT_NAME
        self._variables = dict(variables or {})
        self._say = say

    @property
    def environment(self) -> dict[str, str]:
        """What podman and podman-compose need on top of this process's environment."""
        return {
            NAME_VARIABLE: self.name,
            podman_service.DIRECTORY_VARIABLE: str(podman_service.directory()),
            **machine.environment(self.project),
            **self._variables,
        }

    def up(self, *, timeout: float = 60.0) -> list[inventory.Container]:
        """Bring everything up and wait until it runs, ``timeout`` seconds at most; safe to repeat.

        Builds the image when its inputs changed and replaces containers of an older one, and those that have
        ended without podman's knowledge. Raises FerryError ``machine_unfit``, ``podman_unreachable`` or
        ``setup_failed``.
        """
        _need_root()
        self._need_project()
        image.build(self.project, say=self._say)
        if podman_service.ensure(self.environment):
            self._say("started podman's service")
        self._say("starting containers")
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        self._memory.touch()
        before = self.containers()
        self._remove_containers([container for container in before if container.state == "gone"])
        current = image.image_id()
        stale = any(container.image != current for container in before)
        try:
            run(
                [*inventory.podman_compose(), "up", "--detach", *(["--force-recreate"] if stale else [])],
                timeout=UP_TIMEOUT,
                doing="starting the containers",
                hint=_PORTS_HINT,
                env=self.environment,
                cwd=self.project,
            )
            return self._wait_until_running(timeout)
        except FerryError:
            if not before:  # nothing half-done: what was there before us is not ours to end
                self.down()
            raise

    def down(self, *, volumes: bool = False) -> int:
        """Stop and remove the containers, then their network; the log stays unless ``volumes``.

        Returns how many containers there were. Podman's service is stopped if we started it and nobody else
        needs it. Raises FerryError ``setup_failed``.
        """
        _need_root()
        there = self.containers()
        # NATS last: the others say goodbye over it.
        for group in (
            [container for container in there if container.service != "nats"],
            [container for container in there if container.service == "nats"],
        ):
            self._remove_containers(group)
        self._remove("network")
        if volumes:
            self._remove("volume")
            self._memory.unlink(missing_ok=True)
        if not inventory.containers(None, self.environment):
            podman_service.stop_own()
        return len(there)

    def clean(self, *, images: bool = True) -> None:
        """Remove all that is ours, the log included: containers, network, volumes; with ``images`` those too.

        Images that another copy of the system still uses stay. Raises FerryError ``setup_failed``.
        """
        self.down(volumes=True)
        if not images or inventory.containers(None, self.environment):
            return
        for reference in (image.BENCH_IMAGE, image.IMAGE, image.OWN_BASE):
            if attempt(["podman", "image", "exists", reference], timeout=30, env=self.environment).ok:
                run(
                    ["podman", "image", "rm", reference],
                    timeout=120,
                    doing=f"removing {reference}",
                    env=self.environment,
                )
        machine.remove_containers_conf()

    @property
    def _memory(self) -> Path:
        """An empty file that tells that this copy was started from this checkout."""
        return self.project / STARTED / self.name

    def containers(self) -> list[inventory.Container]:
        """This copy's containers, in any state."""
        return inventory.containers(self.name, self.environment)

    def logs(self, service: str, *, lines: int = 20) -> str:
        """The last ``lines`` that a service printed; empty if it has no container."""
        for container in self.containers():
            if container.service == service:
                return attempt(
                    ["podman", "logs", "--tail", str(lines), container.id], timeout=30, env=self.environment
                ).output
        return ""

    def _need_project(self) -> None:
        if not (self.project / "compose.yaml").is_file():
            raise FerryError(
                "setup_failed",
                f"{self.project} is not quicferry's folder: compose.yaml is not there.",
                hint="Run this inside a checkout, or name one with --project.",
            )

    def _wait_until_running(self, timeout: float) -> list[inventory.Container]:
        deadline = time.monotonic() + timeout
        while True:
            there = self.containers()
            missing = set(SERVICES) - {item.service for item in there if item.state == "running"}
            if not missing:
                return there
            if time.monotonic() > deadline:
                service = min(missing)
                said = self.logs(service)[-KEPT_CHARACTERS:]
                raise FerryError(
                    "setup_failed",
                    f"{service} does not run after {timeout:g} s. It said: {said or 'nothing'}",
                    hint="podman-compose logs shows all of it; quicferry doctor looks at the machine.",
                )
            time.sleep(0.1)  # podman's own `wait` knows no list and no time limit

    def _remove_containers(self, these: Sequence[inventory.Container]) -> None:
        """Stop and remove some of this copy's containers, with their unnamed volumes."""
        if not these:
            return
        command = ["podman", "rm", "--force", "--volumes", "--time", str(STOP_GRACE), *(one.id for one in these)]
        limit = 30 + STOP_GRACE * len(these)
        # Podman 4.3 gives up on a container whose conmon was killed, but notes its end: the second time it's removed.
        if not attempt(command, timeout=limit, env=self.environment).ok:
            run([*command, "--ignore"], timeout=limit, doing="removing the containers", env=self.environment)

    def _remove(self, kind: str) -> None:
        """Remove this copy's networks or volumes, by label."""
        if names := inventory.named(kind, self.name, self.environment):
            run(
                ["podman", kind, "rm", *names],
                timeout=60,
                doing=f"removing {kind}s",
                env=self.environment,
            )


_PORTS_HINT = (
    "If a port is taken: SRC_PORT, DST_PORT and NATS_PORT choose others. quicferry doctor looks at the machine."
)


def _need_root() -> None:
    if os.geteuid() != 0:
        raise FerryError(
            "machine_unfit",
            "Containers that move processes need root.",
            hint="Run it with sudo.",
        )


def remembered(project: Path) -> list[str]:
    """Names of the copies that were started from this checkout and whose volumes are not removed yet."""
    folder = project.resolve() / STARTED
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def up(
    project: Path,
    *,
    name: str | None = None,
    variables: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    say: Say = _quiet,
) -> list[inventory.Container]:
    """:meth:`Stack.up`."""
    return Stack(project, name=name, variables=variables, say=say).up(timeout=timeout)


def down(project: Path, *, name: str | None = None, volumes: bool = False) -> int:
    """:meth:`Stack.down`."""
    return Stack(project, name=name).down(volumes=volumes)


def clean(project: Path, *, name: str | None = None, images: bool = True) -> None:
    """:meth:`Stack.clean`."""
    Stack(project, name=name).clean(images=images)


def build(project: Path, *, say: Say = _quiet, force: bool = False) -> bool:
    """Build the image if its inputs changed; True if it was built. See :func:`quicferry.host.image.build`."""
    _need_root()
    return image.build(project, say=say, force=force)
