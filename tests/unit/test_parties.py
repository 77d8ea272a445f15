"""Two coordinators, both agents, the server and the log through arbitrary interleavings, losses, repeats and deaths.

tests/unit/parties.py models them; the state machine is the real one. It goes beyond test_machine_stateful.py where
time matters: steps take several turns, a coordinator lags behind the log, a command comes when its migration is over.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from quicferry.migration.commands import ArmServer, CallAgent
from quicferry.migration.machine import Phase, State, handle
from quicferry.migration.replay import replay
from quicferry.migration.retries import last_attempt
from quicferry.protocol import events as ev
from tests.effort import examples
from tests.unit.parties import Coordinator, StepError, Task, World

TURNS_TO_THE_END = 3000
SPARE_ATTEMPTS = {Phase.ABORTING: 2, Phase.RESUMING: 4}
"""Time passes no further while there are faults: what is tested is that it ends well when they stop."""


class Parties(RuleBasedStateMachine):
    """Faults are rules; whatever needs none is one of World's actions."""

    @initialize(rounds=st.sampled_from([0, 0, 2]))
    def begin(self, rounds: int) -> None:
        self.world = World()
        self.asked = int(self.world.coordinators[0].request("m1", pre_copy_rounds=rounds))

    # Without a fault.

    @rule(number=st.integers(0, 1000))
    def something_happens(self, number: int) -> None:
        if actions := self.world.actions():
            actions[number % len(actions)]()

    # Three of it, so that faults are not all that happens.
    @rule(seed=st.integers(0, 2**16), turns=st.integers(1, 60))
    def much_happens(self, seed: int, turns: int) -> None:
        self._much(seed, turns)

    @rule(seed=st.integers(0, 2**16), turns=st.integers(1, 10))
    def some_happens(self, seed: int, turns: int) -> None:
        self._much(seed, turns)

    @rule(seed=st.integers(0, 2**16), turns=st.integers(5, 20))
    def more_happens(self, seed: int, turns: int) -> None:
        self._much(seed, turns)

    def _much(self, seed: int, turns: int) -> None:
        chance = random.Random(seed)
        for _ in range(turns):
            if not (actions := self.world.actions()):
                return
            chance.choice(actions)()
            self.always()

    @rule(who=st.integers(0, 1), rounds=st.sampled_from([0, 0, 2]))
    def a_move_is_asked_for(self, who: int, rounds: int) -> None:
        self.asked += self.world.coordinators[who].request(f"m{self.asked + 1}", pre_copy_rounds=rounds)

    @rule(back=st.integers(0, 2))
    def somebody_cancels(self, back: int) -> None:
        migration = f"m{max(1, self.asked - back)}"
        if self.asked:
            self.world.log.append(ev.CancelAsked(id=migration, at_ms=0))

    # Time.

    @rule(who=st.integers(0, 1), number=st.integers(0, 9))
    def a_timer_fires(self, who: int, number: int) -> None:
        coordinator = self.world.coordinators[who]
        if coordinator.timers:
            migration = sorted(coordinator.timers)[number % len(coordinator.timers)]
            state = _state(self.world, migration)
            if state.phase not in SPARE_ATTEMPTS or _may_go_on(state):
                coordinator.fire(migration)

    @rule(who=st.integers(0, 1))
    def nobody_comes_for_long(self, who: int) -> None:
        """An agent is down for most of the hour that it is waited for."""
        coordinator = self.world.coordinators[who]
        for migration in sorted(coordinator.timers):
            while migration in coordinator.timers and _may_go_on(_state(self.world, migration)):
                coordinator.fire(migration)
                coordinator.catch_up()

    @rule(role=st.sampled_from(["checkpoint", "restore"]))
    def a_step_has_waited_too_long(self, role: str) -> None:
        agent = self.world.agents[role]
        if waiting := agent.waiting():
            agent.give_up(waiting[0], "phase_timeout")

    @rule()
    def message_ids_are_forgotten(self) -> None:
        self.world.log.remembered.clear()

    # Faults.

    @rule(who=st.integers(0, 1), number=st.integers(0, 9), taken=st.booleans())
    def a_call_fails(self, who: int, number: int, taken: bool) -> None:
        """Nobody answers; with ``taken`` it was only the answer that was lost."""
        coordinator = self.world.coordinators[who]
        calls = [task for task in coordinator.tasks if isinstance(task.command, CallAgent | ArmServer)]
        if calls:
            task = calls[number % len(calls)]
            coordinator.tasks.remove(task)
            if taken:
                _ask(coordinator, task)
            coordinator.call_failed(task, "no_answer")

    @rule(who=st.integers(0, 1), number=st.integers(0, 9))
    def a_call_comes_twice(self, who: int, number: int) -> None:
        coordinator = self.world.coordinators[who]
        calls = [task for task in coordinator.tasks if isinstance(task.command, CallAgent | ArmServer)]
        if calls:
            _ask(coordinator, calls[number % len(calls)])

    @rule(role=st.sampled_from(["checkpoint", "restore"]), number=st.integers(0, 9))
    def a_step_fails(self, role: str, number: int) -> None:
        agent = self.world.agents[role]
        if running := [run for run in agent.runs.values() if run.running]:
            agent.give_up(running[number % len(running)], "criu_failed")

    @rule(role=st.sampled_from(["checkpoint", "restore"]))
    def an_event_is_lost(self, role: str) -> None:
        del self.world.agents[role].unpublished[:1]

    @rule(number=st.integers(0, 200))
    def an_event_comes_again(self, number: int) -> None:
        """Beyond the window in which the log knows it again."""
        seen = [event for event in self.world.log.entries if not isinstance(event, ev.Decision)]
        if seen:
            self.world.log.entries.append(seen[number % len(seen)])

    @rule(role=st.sampled_from(["checkpoint", "restore"]), again=st.booleans())
    def an_agent_dies(self, role: str, again: bool) -> None:
        self.world.agents[role].die()
        if again:
            self.world.agents[role].start()

    @rule(role=st.sampled_from(["checkpoint", "restore"]))
    def an_agent_starts(self, role: str) -> None:
        if not self.world.agents[role].alive:
            self.world.agents[role].start()

    @rule(who=st.integers(0, 1), again=st.booleans())
    def a_coordinator_dies(self, who: int, again: bool) -> None:
        self.world.coordinators[who].die()
        if again:
            self.world.coordinators[who].start()

    @rule(who=st.integers(0, 1))
    def a_coordinator_starts(self, who: int) -> None:
        if not self.world.coordinators[who].alive:
            self.world.coordinators[who].start()

    @rule()
    def what_was_restored_dies(self) -> None:
        for name, server in self.world.berths.items():
            if server is not None and server.state == "restored":
                self.world.berths[name] = None

    # What must always hold.

    @invariant()
    def always(self) -> None:
        world = self.world
        sockets = [name for name, server in world.berths.items() if server is not None and server.socket]
        assert len(sockets) <= 1, "two copies hold a socket that sends"
        assert sockets == world.serving, "one runs without a socket, or stands still with one"
        assert any(world.berths.values()), "the server is gone"
        called_off = {event.id for event in world.log.entries if isinstance(event, ev.Disarmed)}
        armed = {server.armed for server in world.berths.values() if server is not None}
        assert not armed & called_off, "armed again after it was called off"
        for number in range(1, self.asked + 1):
            self._one(f"m{number}")

    def _one(self, migration: str) -> None:
        decisions = self.world.log.decisions(migration)
        assert len(decisions) == len(set(decisions)), "decided twice"
        ends = [name for name in decisions if name in ("completed", "rolled_back", "failed")]
        assert len(ends) <= 1
        assert ends == decisions[-1:] or not ends, "decided after the end"
        assert not ("committed" in decisions and "rolled_back" in decisions)
        assert "completed" not in decisions or "committed" in decisions
        entries = [ev.kind(event) for event in self.world.log.entries if event.id == migration]
        if "committed" in decisions:
            before = entries[: entries.index("decision.committed")]
            assert {"checkpoint.dumped", "restore.restored"} <= set(before), "committed without a copy"
        requests = [event for event in self.world.log.entries if isinstance(event, ev.Requested)]
        committed = [r.epoch for r in requests if "committed" in self.world.log.decisions(r.id)]
        assert committed == list(range(1, len(committed) + 1)), "an epoch was left out, or used twice"
        assert self.world.placed <= len(committed)

    @invariant()
    def facts_may_be_repeated(self) -> None:
        if self.world.log.entries:
            event = self.world.log.entries[-1]
            state = _state(self.world, event.id)
            assert handle(state, event)[0] == state, "the same fact twice is not what it is once"

    # The end.

    def teardown(self) -> None:
        """The faults stop: everybody is there, every call arrives, time passes."""
        world = self.world
        self._calm()
        self._check_rest()
        assert world.coordinators[0].request("last"), "the next move is refused"
        before = world.serving
        self._calm()
        self._check_rest()
        assert world.log.decisions("last")[-1] == "completed", "the next move does not succeed"
        assert world.serving != before
        for coordinator in world.coordinators:
            assert coordinator.states == {id_: _state(world, id_) for id_ in coordinator.states}
        for id_ in world.coordinators[0].states:
            steps = replay(event for event in world.log.entries if event.id == id_)
            assert not [step.differs for step in steps if step.differs]

    def _calm(self) -> None:
        world = self.world
        for agent in world.agents.values():
            if not agent.alive:
                agent.start()
        for coordinator in world.coordinators:
            if not coordinator.alive:
                coordinator.start()
        for turn in range(TURNS_TO_THE_END):
            if actions := world.actions():
                actions[turn % len(actions)]()
                self.always()
            elif not self.time_passes():
                return
        raise AssertionError("it does not come to rest")

    def time_passes(self) -> bool:
        world = self.world
        for agent in world.agents.values():
            if waiting := agent.waiting():
                agent.give_up(waiting[0], "phase_timeout")
                return True
        for coordinator in world.coordinators:
            if coordinator.timers:
                coordinator.fire(next(iter(coordinator.timers)))
                return True
        for server in world.berths.values():
            if server is not None:
                server.armed = ""  # an arming that nobody follows up ends by itself
        return False

    def _check_rest(self) -> None:
        world = self.world
        for id_, state in world.coordinators[0].states.items():
            assert state.outcome is not None, f"{id_} is left in phase {state.phase}"
            assert not state.gave_up, "it gave up though nothing was wrong any more"
        assert len(world.serving) == 1
        assert sum(server is not None for server in world.berths.values()) == 1, "a copy is left over"
        (server,) = (server for server in world.berths.values() if server is not None)
        assert not server.moving
        assert not world.docks, "a parked socket is left over"
        assert not world.images, "images are left over"
        assert not any(agent.sides for agent in world.agents.values())


def _may_go_on(state: State) -> bool:
    """Whether its abort or resume has attempts to spare."""
    spare = SPARE_ATTEMPTS.get(state.phase)
    return spare is not None and state.attempt < last_attempt(state) - spare


def _state(world: World, migration: str) -> State:
    state = None
    for event in world.log.entries:
        if event.id == migration:
            state, _ = handle(state, event)
    assert state is not None
    return state


def _ask(coordinator: Coordinator, task: Task) -> None:
    try:
        coordinator.ask(task)
    except StepError:
        return  # the answer that was lost was a no


FAULTS: tuple[tuple[str, dict[str, tuple[object, ...]]], ...] = (
    ("a_move_is_asked_for", {"who": (0, 1), "rounds": (0, 0, 2)}),
    ("somebody_cancels", {"back": (0, 1, 2)}),
    ("a_timer_fires", {"who": (0, 1), "number": (0, 1)}),
    ("nobody_comes_for_long", {"who": (0, 1)}),
    ("a_step_has_waited_too_long", {"role": ("checkpoint", "restore")}),
    ("message_ids_are_forgotten", {}),
    ("a_call_fails", {"who": (0, 1), "number": (0, 1, 2), "taken": (True, False)}),
    ("a_call_comes_twice", {"who": (0, 1), "number": (0, 1, 2)}),
    ("a_step_fails", {"role": ("checkpoint", "restore"), "number": (0, 1)}),
    ("an_event_is_lost", {"role": ("checkpoint", "restore")}),
    ("an_event_comes_again", {"number": tuple(range(40))}),
    ("an_agent_dies", {"role": ("checkpoint", "restore"), "again": (True, True, False)}),
    ("an_agent_starts", {"role": ("checkpoint", "restore")}),
    ("a_coordinator_dies", {"who": (0, 1), "again": (True, True, False)}),
    ("a_coordinator_starts", {"who": (0, 1)}),
    ("what_was_restored_dies", {}),
)


@pytest.mark.parametrize("first", range(0, examples(1000), 100))
def test_long_walks_with_few_faults(first: int) -> None:
    """The same rules at random, a hundred walks a test: hypothesis' own runs are mostly faults and seldom get far."""
    for seed in range(first, first + 100):
        chance = random.Random(seed)
        parties = Parties()
        parties.begin(rounds=chance.choice([0, 0, 0, 2]))
        walked = [f"seed {seed}"]
        faulty = chance.choice([0.02, 0.05, 0.1, 0.2])
        try:
            for _ in range(chance.choice([30, 60, 120])):
                if chance.random() < faulty:
                    name, choices = chance.choice(FAULTS)
                    drawn = {argument: chance.choice(values) for argument, values in choices.items()}
                    walked.append(f"after {len(parties.world.log.entries)} entries: {name}{drawn}")
                    getattr(Parties, name)(parties, **drawn)
                elif actions := parties.world.actions():
                    chance.choice(actions)()
                parties.always()
                parties.facts_may_be_repeated()
            parties.teardown()
        except Exception as error:  # noqa: BLE001 - whatever it is, the way there is what helps
            log = [f"{event.id} {ev.kind(event)}" for event in parties.world.log.entries]
            pytest.fail(f"{error!r}\n" + "\n".join([*walked, "the log:", *log]))


Parties.TestCase.settings = settings(max_examples=examples(100), stateful_step_count=40, deadline=None)
TestParties = Parties.TestCase
