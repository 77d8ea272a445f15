"""``python -m tests.faults``: the fault matrix as a table and as JSON; ``--help`` says what can be chosen."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import structlog

from tests.faults.matrix import Case, cases
from tests.faults.walk import Row, walk
from tests.faults.world import world


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults", description="Break every step of a move, one at a time.")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    parser.add_argument("--only", default="", help="cases whose point and fault contain this text")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, by chance")
    parser.add_argument("--seed", type=int, default=0, help="of that chance")
    parser.add_argument("--list", action="store_true", help="print the cases and walk none")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if arguments.only in f"{case.shown} {case.fault}"]
    if arguments.sample:
        chosen = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
    if arguments.list:
        print("\n".join(f"{case.shown:<58} {case.fault}" for case in chosen))
        return 0
    began = time.monotonic()
    rows = asyncio.run(_walked(chosen))
    if arguments.out:
        arguments.out.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1) + b"\n")
    broken = [row for row in rows if not row.held]
    print(f"{len(rows)} cases, {len(rows) - len(broken)} held, in {(time.monotonic() - began) / 60:.0f} min")
    return 1 if broken or not rows else 0


async def _walked(chosen: list[Case]) -> list[Row]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # the client's
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # nothing is left behind then, too
    with tempfile.TemporaryDirectory(prefix="quicferry-faults-") as folder:
        async with world(Path(folder)) as made:
            rows = await walk(made, chosen, show)
        if not all(row.held for row in rows):
            for log in sorted(Path(folder).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-20_000:]}", file=sys.stderr)
        return rows


def show(row: Row) -> None:
    print(f"{'held' if row.held else 'LOST':<5}{row.point:<52} {row.fault:<24} {row.outcome}", flush=True)
    if not row.held:
        print(f"     {row.why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
