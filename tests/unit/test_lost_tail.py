"""What becomes of a migration when the host of NATS loses power and the log comes back shorter.

The table of docs/operations.md: berths and agents are on another host and live on. A few moves are cut at every
point, and lose every tail that can be lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from quicferry.protocol import events as ev
from tests.unit.parties import World
from tests.unit.test_parties import TURNS_TO_THE_END, Parties

SEEDS = range(4)


class Cut(NamedTuple):
    """How it was when the power failed, and what became of it."""

    kept: frozenset[str]
    """Kinds of entries that the log came back with."""
    committed: bool
    """In the log before, so that others had acted on it."""
    source: str
    """Its state once the agents had nothing left to do; empty if it is gone."""
    target: str
    end: str
    """The last decision."""
    serving: list[str]
    sockets: int
    """The most that could send at once."""


def cuts() -> Iterator[Cut]:
    for seed in SEEDS:
        turns = 0
        while (world := _moving(seed, turns)) is not None:
            entries = len(world.log.entries)
            for keep in range(1, entries + 1):
                world = _moving(seed, turns)
                assert world is not None
                yield _cut(world, keep)
            turns += 1


def _moving(seed: int, turns: int) -> World | None:
    """A move after so many turns; None when it is over before."""
    chance = random.Random(seed)
    world = World()
    del world.coordinators[1:]
    assert world.coordinators[0].request("m1")
    for _ in range(turns):
        if not (actions := world.actions()):
            return None
        chance.choice(actions)()
    return world


def _cut(world: World, keep: int) -> Cut:
    committed = "committed" in world.log.decisions("m1")
    world.lose_power(keep)
    kept = frozenset(ev.kind(event) for event in world.log.entries)
    source, target = (server.state if server else "" for server in world.berths.values())
    sockets = _come_to_rest(world)
    return Cut(kept, committed, source, target, world.log.decisions("m1")[-1], world.serving, sockets)


def _come_to_rest(world: World) -> int:
    """The power is back. Returns how many copies could send at once, at most."""
    world.coordinators[0].start()
    time = Parties()
    time.world = world
    most = 0
    for turn in range(TURNS_TO_THE_END):
        if actions := world.actions():
            actions[turn % len(actions)]()
        elif not time.time_passes():
            return most
        most = max(most, sum(server is not None and server.socket for server in world.berths.values()))
    raise AssertionError("it does not come to rest")


@pytest.fixture(scope="module")
def found() -> list[Cut]:
    return list(cuts())


def test_what_is_lost_behind_the_commit_is_said_again(found: list[Cut]) -> None:
    some = [cut for cut in found if "decision.committed" in cut.kept]
    assert some
    assert {(cut.end, *cut.serving) for cut in some} == {("completed", "b")}
    assert max(cut.sockets for cut in some) == 1


def test_a_commit_that_is_lost_behind_the_arming_is_written_again(found: list[Cut]) -> None:
    some = [c for c in found if c.committed and "coordinator.armed" in c.kept and "decision.committed" not in c.kept]
    assert {cut.source for cut in some} == {"frozen", ""}
    assert {(cut.end, *cut.serving) for cut in some} == {("completed", "b")}
    assert max(cut.sockets for cut in some) == 1


def test_while_the_target_does_not_serve_any_lost_tail_leaves_one_copy(found: list[Cut]) -> None:
    some = [cut for cut in found if cut.target != "running"]
    assert {cut.committed for cut in some} == {True, False}
    assert {(cut.end, *cut.serving) for cut in some} == {("completed", "b"), ("rolled_back", "a")}
    assert max(cut.sockets for cut in some) == 1


def test_a_commit_that_is_lost_with_the_arming_is_taken_back_though_the_target_serves(found: list[Cut]) -> None:
    """Not as it should be, and the reason why NATS syncs always: who mends it changes the documents too."""
    some = [cut for cut in found if cut.committed and "coordinator.armed" not in cut.kept and cut.target == "running"]
    assert {cut.end for cut in some} == {"rolled_back"}
    assert {tuple(cut.serving) for cut in some if not cut.source} == {("b",)}
    assert {tuple(cut.serving) for cut in some if cut.source} == {("a", "b")}
