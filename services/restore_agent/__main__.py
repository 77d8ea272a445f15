"""Runs the restore agent: ``python -m services.restore_agent``.

Environment: NATS_URL, QUICFERRY_NODE (default ``local``), QUICFERRY_IMAGES, CONTAINER_HOST (podman's socket),
QUICFERRY_CRIU_LOG_LEVEL. Runs as root in the host's PID namespace.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import structlog

from quicferry import service
from quicferry.bus.agent import Agent
from quicferry.bus.settings import NatsSettings
from quicferry.host import processes
from quicferry.host.images import DEFAULT_ROOT, Leftovers, check_root
from quicferry.host.podman import Podman
from quicferry.protocol.errors import FerryError
from services.restore_agent.steps import RestoreSteps

log = structlog.get_logger(__name__)


async def work() -> None:
    """Everything comes from the environment. Raises FerryError before it serves, never while it does."""
    settings = NatsSettings.load()
    node = os.environ.get("QUICFERRY_NODE", "local")
    images = check_root(Path(os.environ.get("QUICFERRY_IMAGES", str(DEFAULT_ROOT))))
    processes.hurry()
    podman = Podman()
    try:
        steps = RestoreSteps(podman, images)
        await refuse_own_pid_namespace(steps)
        agent = Agent("restore", node, steps.all(), close=steps.close, leftovers=Leftovers(images, "target"))
        await agent.run(settings)
    finally:
        podman.close()


async def refuse_own_pid_namespace(steps: RestoreSteps) -> None:
    """Fail at start where it would fail at every migration. Raises FerryError ``host_pid_namespace``."""
    try:
        await steps.check()
    except FerryError as error:
        if error.code == "host_pid_namespace":
            raise
        # Podman may come up later; until then every prepare says so.
        log.warning("berths_unknown", code=error.code, error=error.message, hint=error.hint)


if __name__ == "__main__":
    sys.exit(service.main("restore-agent", work))
