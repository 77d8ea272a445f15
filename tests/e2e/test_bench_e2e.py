"""The benchmark on a real system, and the guard over it: ratios and counts only, never a time.

What is compared is measured in the same moves on the same machine, so a slow or busy machine slows both.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quicferry.bench.figures import Result
from quicferry.bench.run import Bench, Plan
from quicferry.host.compose import Stack
from quicferry.protocol import events as ev
from tests.e2e.moving import System

MOVES = 5
GAP_OVER_FLOOR = 2.0
"""The median is about 1.25 and the target 1.2; what made it worse than this would be a step backwards."""
IMAGE_MB = 5.0
"""About 2.4 today, and 24 if the heap were copied: a heap that is not shared any more would show here."""
CURVE_OVER = 4.0


@pytest.fixture(scope="module")
def system(stack: Stack, stack_variables: dict[str, str]) -> System:
    return System(stack, stack_variables)


@pytest.fixture
async def result(system: System) -> Result:
    await system.address()  # until the server serves
    said: list[str] = []
    async with system.bus() as bus:
        bench = Bench(
            bus=bus,
            stack=system.stack,
            project=Path(__file__).parents[2],
            cafile=system.cafile,
            service="echo",
            say=said.append,
        )
        before = {container.id for container in system.stack.containers()}
        # No curve over memory: each size is a service, and the log of the session's system would keep it.
        plan = Plan(moves=1, bulk_moves=0, variants=("source-order", "reconnect", "floor"))
        alternatives = await bench.run(plan, command="")
        plan = Plan(moves=MOVES, bulk_moves=3, variants=("ferry",), connections=(1, 10), curve_moves=3)
        ours = await bench.run(plan, command="")
    assert {container.id for container in system.stack.containers()} == before, "the benchmark left containers"
    return Result(
        machine=ours.machine,
        variants=ours.variants | alternatives.variants,
        curves=ours.curves | alternatives.curves,
    )


async def test_the_pause_is_crius_time_and_little_else(result: Result) -> None:
    ferry = result.variants["ferry"]
    assert ferry.moves == MOVES
    assert (ferry.echoes_lost, ferry.handshakes) == (0, 0)
    assert ferry.gap_over_floor is not None
    assert 1.0 <= ferry.gap_over_floor.median <= GAP_OVER_FLOOR
    assert ferry.image_mb is not None
    assert 1.0 < ferry.image_mb.max <= IMAGE_MB
    assert ferry.cwnd_before is not None
    assert ferry.cwnd_after == ferry.cwnd_before, "a move cost congestion window"
    assert {"ack", "dump", "restore", "adopt", "first echo"} <= set(ferry.phases_ms)
    assert ferry.throughput_ratio is not None
    assert ferry.throughput_ratio.median > 0.5

    # Each alternative did what its name says, or it is no comparison.
    order, again, floor = (result.variants[name] for name in ("source-order", "reconnect", "floor"))
    assert (order.handshakes, order.echoes_lost) == (0, 0)
    assert order.gap_over_floor is not None
    assert again.handshakes == 1
    assert again.echoes_lost > 0
    assert again.gap_ms is not None
    assert ferry.gap_ms is not None
    assert ferry.gap_ms.median < again.gap_ms.median
    assert floor.echoes_sent == 0
    assert floor.floor_ms is not None

    few, more = result.curves["connections"]
    assert (few.x, more.x, more.arrived) == (1, 10, 10)
    assert few.echoes_lost == more.echoes_lost == more.handshakes == 0
    assert few.gap_ms is not None
    assert more.gap_ms is not None
    assert more.gap_ms.median / few.gap_ms.median <= CURVE_OVER


async def test_one_criu_on_either_side_and_one_dump_of_few_bytes(system: System) -> None:
    """What a move asks of CRIU, by the log: once each; another attempt or round would be an event more."""
    async with system.client("guard"):
        _, events = await system.move()
    kinds = [ev.kind(event) for event in events]
    for once in (
        "checkpoint.prepared",
        "checkpoint.held",
        "checkpoint.dumped",
        "checkpoint.released",
        "restore.prepared",
        "restore.restored",
        "restore.resumed",
    ):
        assert kinds.count(once) == 1, once
    assert not [kind for kind in kinds if kind.endswith((".failed", ".timeout", ".pre_dumped"))]
    [dumped] = [event for event in events if isinstance(event, ev.Dumped)]
    assert dumped.image_bytes <= IMAGE_MB * 1e6
    [agents] = [[c.id for c in system.stack.containers() if c.service.endswith("-agent")]]
    assert len(agents) == 2
    said = [system.stack.logs(service, lines=400) for service in ("checkpoint-agent", "restore-agent")]
    migration = dumped.id
    assert [sum(migration in line and "_ready" in line for line in log.splitlines()) for log in said] == [1, 1]
