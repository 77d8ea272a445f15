"""``python -m tests.soak --minutes 30``: the report on standard output, and as JSON; ``--help`` says the rest."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
import tempfile
from pathlib import Path

import msgspec
import structlog

from tests.soak import report
from tests.soak.conductor import Plan, soak
from tests.soak.record import Result


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description="Move servers about and break things, for long.")
    parser.add_argument("--minutes", type=float, default=30.0, help="for so long (30)")
    parser.add_argument(
        "--seed", type=int, help="of everything that is left to chance; chosen and printed if not given"
    )
    parser.add_argument("--services", type=int, default=4, help="the last of several is one whose server may die (4)")
    parser.add_argument("--clients", type=int, default=5, help="of each service (5)")
    parser.add_argument("--interval-ms", type=float, default=50.0, help="between a client's pings (50)")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between a service's moves, about (2)")
    parser.add_argument("--no-faults", action="store_true", help="moves, cancels and bad requests only")
    parser.add_argument("--out", type=Path, help="write all that was seen there, as JSON")
    parser.add_argument("--evidence", type=Path, help="a directory for the logs of violations (a new one below /tmp)")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    with tempfile.TemporaryDirectory(prefix="quicferry-soak-") as folder:
        plan = Plan(
            seconds=arguments.minutes * 60,
            seed=seed,
            services=arguments.services,
            clients=arguments.clients,
            interval_ms=arguments.interval_ms,
            pause=arguments.pause,
            faults=not arguments.no_faults,
            evidence=arguments.evidence or Path(tempfile.gettempdir()) / f"quicferry-soak-evidence-{seed}",
            folder=Path(folder),
        )
        print(f"seed {seed}", flush=True)
        result = asyncio.run(_soaked(plan))
    if arguments.out:
        arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(report.page(result))
    return 0 if result.clean else 1


async def _soaked(plan: Plan) -> Result:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # the soak's own bus
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # nothing is left behind then, too
    return await soak(plan)


if __name__ == "__main__":
    sys.exit(main())
