"""Podman, through podman-py: which berths this node has. The client is synchronous, so it runs in threads."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any, Final, TypeVar

import structlog
from podman import PodmanClient
from podman.errors import NotFound, PodmanError

from quicferry.host import processes
from quicferry.host.berths import LABEL_BERTH, LABEL_STACK, BerthFacts, facts
from quicferry.protocol.errors import FerryError

T = TypeVar("T")
log = structlog.get_logger(__name__)

DEFAULT_URL: Final = "unix:///run/podman/podman.sock"
TIMEOUT: Final = 5.0


class Podman:
    """One podman service, by its socket's URL; ``CONTAINER_HOST`` or the root socket when not given.

    Sees the berths of one stack only, ``stack`` or ``QUICFERRY_STACK``; of all where neither names one.
    """

    def __init__(self, url: str | None = None, *, stack: str | None = None, timeout: float = TIMEOUT) -> None:
        self.url = url or os.environ.get("CONTAINER_HOST") or DEFAULT_URL
        stack = stack or os.environ.get("QUICFERRY_STACK")
        # A list: of a dictionary's own lists podman-py makes one string.
        self._filters = ["status=running", f"label={LABEL_BERTH}"]
        if stack:
            self._filters.append(f"label={LABEL_STACK}={stack}")
        self._timeout = timeout
        self._client = PodmanClient(base_url=self.url, timeout=timeout)
        self._left_out: set[str] = set()
        self._one = asyncio.Lock()
        self._answered = False

    def close(self) -> None:
        self._client.close()  # type: ignore[no-untyped-call]

    async def berths(self) -> list[BerthFacts]:
        """The running berths, by name; one request, so without their cgroups.

        Containers whose labels are malformed are left out with one warning each.
        Raises FerryError ``podman_unreachable``.
        """
        rows = await self._call(
            lambda: [
                container.attrs for container in self._client.containers.list(filters=self._filters, sparse=True)
            ]
        )
        found: list[BerthFacts] = []
        for row in rows:
            try:
                found.append(
                    facts(
                        row.get("Labels") or {},
                        container=row["Id"],
                        image=row.get("ImageID", ""),
                        init_pid=row["Pid"],
                    )
                )
            except FerryError as error:
                self._leave_out(row["Id"], "berth_malformed", error)
        return sorted(found, key=lambda berth: berth.name)

    async def visible_berths(self) -> list[BerthFacts]:
        """As :meth:`berths`, and each is seen to be alive and in our PID namespace's sight.

        Those that have ended without podman's knowledge are left out with one warning each.
        Raises FerryError ``host_pid_namespace``, ``podman_unreachable``.
        """
        found: list[BerthFacts] = []
        for berth in await self.berths():
            try:
                if not processes.is_init(berth.init_pid):
                    berth = await self.inspect(berth.container)  # it may have ended since podman listed it
                    processes.check_init(berth.init_pid, berth.container)
            except FerryError as error:
                if error.code != "berth_gone":
                    raise
                self._leave_out(berth.container, "berth_gone", error)
            else:
                found.append(berth)
        return found

    def _leave_out(self, container: str, event: str, error: FerryError) -> None:
        if container not in self._left_out:
            log.warning(event, container=container[:12], error=error.message, hint=error.hint)
        self._left_out.add(container)

    async def berth(self, name: str) -> BerthFacts:
        """Everything about the running berth ``name``.

        Raises FerryError ``berth_gone`` if there is none, ``podman_unreachable``.
        """
        for berth in await self.berths():
            if berth.name == name:
                return await self.inspect(berth.container)
        raise FerryError(
            "berth_gone",
            f"No running container on this node has the label {LABEL_BERTH}={name}.",
            hint=f"Start it: podman ps -a --filter label={LABEL_BERTH}={name} shows whether it exists.",
        )

    async def inspect(self, container: str) -> BerthFacts:
        """Everything about the berth in ``container``, which must be running."""
        try:
            attrs: dict[str, Any] = await self._call(lambda: self._client.containers.get(container).attrs)
        except NotFound:
            raise FerryError("berth_gone", f"Container {container[:12]} is gone.") from None
        state = attrs.get("State") or {}
        if not state.get("Running") or not state.get("Pid"):
            raise FerryError(
                "berth_gone",
                f"Container {attrs.get('Name', container[:12])} is {state.get('Status', 'not running')}.",
                hint=f"Start it with: podman start {attrs.get('Name', container[:12])}",
            )
        return facts(
            (attrs.get("Config") or {}).get("Labels") or {},
            container=attrs["Id"],
            image=attrs.get("Image", ""),
            init_pid=state["Pid"],
            cgroup_path=state.get("CgroupPath") or "",
            conmon_pid=state.get("ConmonPid") or 0,
        )

    def _knock(self, function: Callable[[], T]) -> T:
        # podman-py leaks a socket for every connect that fails, and says less about why. Podman logs a
        # connection without a request, so this is for the first call and after a failure only.
        if not self._answered and self.url.startswith("unix://"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(self._timeout)
                probe.connect(self.url.removeprefix("unix://"))
        self._answered = False
        outcome = function()
        self._answered = True
        return outcome

    async def _call(self, function: Callable[[], T]) -> T:
        try:
            # The requests inside have the same limit, so the thread ends by itself.
            async with self._one, asyncio.timeout(self._timeout * 2):
                return await asyncio.to_thread(self._knock, function)
        except NotFound:
            raise
        except (PodmanError, OSError) as error:  # requests' errors are OSErrors, TimeoutError too
            raise FerryError(
                "podman_unreachable",
                f"The podman service at {self.url} does not answer: {_short(error)}.",
                hint="Start it with: systemctl start podman.socket, or podman system service --time=0 "
                f"{self.url} & ; an agent in a container needs that socket mounted.",
            ) from None


def _short(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
