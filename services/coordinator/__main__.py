"""``python -m services.coordinator``"""

from __future__ import annotations

import sys

from quicferry import service
from quicferry.bus.settings import NatsSettings
from services.coordinator.service import NAME, coordinate


async def work() -> None:
    """Where NATS is comes from the environment."""
    await coordinate(NatsSettings.load())


if __name__ == "__main__":
    sys.exit(service.main(NAME, work))
