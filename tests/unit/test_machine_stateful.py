"""Every party of a migration in a model, driven through arbitrary interleavings, losses, repeats and deaths.

The state machine is the real one; around it are models of what the agents, the server and the log do
(services/*_agent/steps.py, shared/quicferry/host/, bus/agent.py, services/coordinator/). Checked on every path: one
process at most can send, what the log has decided is what happens, and all comes to its end once the faults stop.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quicferry.migration.commands import ArmServer, CallAgent, Command, Decide, Place, StartTimer, Unlock
from quicferry.migration.machine import Phase, State, handle, outstanding
from quicferry.migration.retries import ABORT_ATTEMPTS, RESUME_ATTEMPTS, last_attempt
from quicferry.protocol import events as ev
from quicferry.protocol.errors import ErrorBody
from tests.effort import examples
from tests.unit.test_machine import BASE, request

ERROR = ErrorBody(code="criu_failed", message="no")
STEPS_TO_THE_END = 400
LAST_PHASES = (Phase.ABORTING, Phase.RESUMING)


class Migration(RuleBasedStateMachine):
    """One migration. The socket is the model's heart: who has it can send, and nobody else can."""

    @initialize()
    def begin(self) -> None:
        self.log: list[ev.AnyEvent] = [request()]
        state, commands = handle(None, self.log[0])
        self.state: State | None = state  # None: the coordinator is dead
        self.timer: StartTimer | None = None
        self.calls: list[CallAgent | ArmServer] = []
        self.decisions: list[tuple[int, Decide]] = []
        """On their way to the log, with the number of decisions in it when they were sent."""
        self.unlocked = False
        # The server's two copies, and who holds a socket that can send.
        self.source = "serving"  # held, frozen, gone
        self.target = "none"  # restored, held, serving
        self.sender: str | None = "source"
        self.parked = False
        self.armed = False
        self.images = False
        self.was_restored = False
        self.aborted: set[str] = set()
        """Agents that have aborted, and take no other step of this migration any more (bus/agent.py)."""
        self.source_agent = False  # it has the move open since prepare, and has not died since
        self.target_agent = False
        self._take(commands)

    # The coordinator.

    def _take(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case CallAgent() | ArmServer():
                    if command not in self.calls:
                        self.calls.append(command)
                case Decide():
                    self.decisions.append((self._decided_so_far(), command))
                case StartTimer():
                    self.timer = command
                case Unlock():
                    self.unlocked = True
                case Place():
                    assert self._decided("committed"), "placed before the commit"
                case _:
                    self.timer = None

    def _say(self, event: ev.AnyEvent) -> None:
        """An entry of the log; only the living coordinator hears of it now."""
        self.log.append(event)
        if self.state is not None:
            self.state, commands = handle(self.state, event)
            self._take(commands)

    def _decided_so_far(self) -> int:
        return sum(isinstance(event, ev.Decision) for event in self.log)

    def _decided(self, decision: str) -> bool:
        return any(ev.kind(event) == f"decision.{decision}" for event in self.log)

    @rule()
    def coordinator_dies(self) -> None:
        self.state, self.timer = None, None
        self.decisions.clear()

    @precondition(lambda self: self.state is None)
    @rule()
    def coordinator_starts(self) -> None:
        state = None
        for event in self.log:
            state, _ = handle(state, event)
        assert state is not None
        self.state = state
        self._take(outstanding(state))

    @precondition(lambda self: self.state is not None and self.decisions)
    @rule()
    def decide(self) -> None:
        after, decision = self.decisions.pop(0)
        if after != self._decided_so_far():
            # The log refuses it (Nats-Expected-Last-Subject-Sequence); the coordinator may want it still.
            assert self.state is not None
            if decision in outstanding(self.state):
                self.decisions.append((self._decided_so_far(), decision))
            return
        match decision.decision:
            case "prepared":
                self._say(ev.Prepared(**BASE))
            case "committed":
                assert self.was_restored, "committed without a target"
                assert self.source in ("frozen", "held"), "committed with a source that runs"
                self._say(ev.Committed(**BASE))
            case "completed":
                self._say(ev.Completed(**BASE, arrived=decision.arrived))
            case "rolled_back":
                self._say(ev.RolledBack(**BASE, reason=decision.reason or ERROR))
            case "failed":
                self._say(ev.Failed(**BASE, reason=decision.reason or ERROR))

    @precondition(lambda self: self.state is not None and self.timer is not None)
    @rule()
    def time_is_up(self) -> None:
        assert self.timer is not None
        timer, self.timer = self.timer, None
        self._say(ev.TimedOut(**BASE, phase=timer.phase, attempt=timer.attempt))

    @precondition(lambda self: self.state is not None and self.state.phase in LAST_PHASES)
    @rule(short_of_the_end=st.integers(0, 2))
    def nobody_comes_for_long(self, short_of_the_end: int) -> None:
        """An agent is down for all of the hour that it is waited for, or a little less."""
        while self.state is not None and self.timer is not None and self.state.phase in LAST_PHASES:
            if self.state.attempt > last_attempt(self.state) - short_of_the_end:
                return
            self.time_is_up()

    @rule()
    def somebody_cancels(self) -> None:
        if self.state is not None and not self._decided("committed"):
            self._say(ev.CancelAsked(**BASE))

    @precondition(lambda self: self.state is not None)
    @rule(steps=st.integers(min_value=1, max_value=15))
    def all_goes_well_for_a_while(self, steps: int) -> None:
        for _ in range(steps):
            if not self._next_step():
                return

    def _next_step(self) -> bool:
        """What comes next without faults and without time passing; whether there was anything."""
        if self.decisions:
            self.decide()
        elif self.calls:
            self._carry_out(self.calls.pop(0))
        else:
            return False
        self.one_can_send()
        self.the_log_decides()
        return True

    # Calls: carried out, lost, repeated, failed.

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), again=st.booleans())
    def call_arrives(self, data: st.DataObject, again: bool) -> None:
        call = data.draw(st.sampled_from(self.calls))
        if not again:
            self.calls.remove(call)
        self._carry_out(call)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def call_is_lost(self, data: st.DataObject) -> None:
        self.calls.remove(data.draw(st.sampled_from(self.calls)))

    @precondition(lambda self: self.calls and self.state is not None)
    @rule(data=st.data())
    def call_fails(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))
        self.calls.remove(call)
        if isinstance(call, ArmServer):
            self._say(ev.CallFailed(**BASE, to=call.name, attempt=1, error=ERROR))
        elif call.agent == "checkpoint":
            self._say(ev.CheckpointFailed(**BASE, verb=call.verb, attempt=call.attempt, error=ERROR))
        else:
            self._say(ev.RestoreFailed(**BASE, verb=call.verb, attempt=call.attempt, error=ERROR))

    def _carry_out(self, call: CallAgent | ArmServer) -> None:
        if isinstance(call, CallAgent):
            if call.verb == "abort":
                self.aborted.add(call.agent)
            elif call.agent in self.aborted:
                self._say(ev.CallFailed(**BASE, to=call.name, attempt=call.attempt, error=ERROR))
                return
        match call.name:
            case "server.arm":
                if self.source == "serving" and self.target == "none":
                    self.armed = True
                    self._say(ev.Armed(**BASE, clients=0))
            case "server.disarm":
                if self.source == "serving":
                    self.armed = False
                    self._say(ev.Disarmed(**BASE))
                else:
                    self._say(ev.CallFailed(**BASE, to="server.disarm", attempt=1, error=ERROR))
            case "checkpoint.prepare":
                if self.source == "serving":
                    self.source_agent = True
                    self._say(ev.SourceReady(**BASE, image="i", rss_bytes=1))
            case "restore.prepare":
                if self.target == "none":
                    self.target_agent = self.parked = True
                    self._say(ev.TargetReady(**BASE, image="i"))
            case "checkpoint.dump":
                self._dump()
            case "restore.restore":
                self._restore()
            case "restore.resume":
                self._resume()
            case "checkpoint.release":
                if self.source in ("held", "frozen"):
                    self.source = "gone"
                self._say(ev.SourceGone(**BASE))
            case "checkpoint.abort":
                # It thaws, and gives the server its own socket back, or a new one.
                if self.source in ("held", "frozen"):
                    self.source, self.sender = "serving", "source"
                self.armed = self.images = False
                self._say(ev.SourceBack(**BASE))
            case "restore.abort":
                if self.target != "serving":
                    self.target = "none"
                self.parked = self.target_agent = self.images = False
                self._say(ev.TargetCleared(**BASE))

    def _dump(self) -> None:
        if not self.source_agent or self.source not in ("serving", "frozen"):
            self._say(ev.CheckpointFailed(**BASE, verb="dump", attempt=1, error=ERROR))
            return
        if self.source == "serving":
            if not self.armed:
                return  # SIGTERM would end it; the agent is asked only once it was armed
            self.source, self.sender, self.armed = "frozen", None, False
            self.images = True
        self._say(ev.SourceHeld(**BASE, waited_ms=1))
        self._say(ev.Dumped(**BASE, pages=1, image_bytes=1, took_ms=1))

    def _restore(self) -> None:
        if not self.images:
            return  # it waits for them
        if not self.target_agent:
            self._say(ev.RestoreFailed(**BASE, verb="restore", attempt=1, error=ERROR))
            return
        if self.target == "none":
            self.target, self.was_restored = "restored", True
        self._say(ev.Restored(**BASE, took_ms=1))

    def _resume(self) -> None:
        assert self._decided("committed"), "resumed before the commit"
        if self.target != "serving":
            if self.target == "none":
                # Restored again: from the images, and with the memory that the source still holds.
                assert self.images, "the images were gone before the target served"
            assert self.sender is None, "two can send"
            self.target, self.sender, self.target_agent, self.parked = "serving", "target", True, False
            self.images = False
            self._say(ev.Adopted(**BASE, outcome="moved", still_ms=1))
        self._say(ev.Resumed(**BASE, took_ms=1, queued=0))

    # Deaths. A dead agent's CRIU lets its tasks go: mute, for they hold no socket.

    def _lose_calls(self, agent: str) -> None:
        """What was on its way to an agent that died reaches nobody; the next one has forgotten what was aborted."""
        self.calls = [call for call in self.calls if isinstance(call, ArmServer) or call.agent != agent]
        self.aborted.discard(agent)

    @rule()
    def checkpoint_agent_dies(self) -> None:
        self._lose_calls("checkpoint")
        self.source_agent = False
        if self.source == "frozen":
            self.source = "held"

    @rule()
    def restore_agent_dies(self) -> None:
        self._lose_calls("restore")
        self.target_agent = self.parked = False
        if self.target == "restored":
            self.target = "held"

    @precondition(lambda self: self.target in ("restored", "held"))
    @rule()
    def what_was_restored_dies(self) -> None:
        self.target = "none"

    # What must always hold.

    @invariant()
    def one_can_send(self) -> None:
        senders = [self.source == "serving", self.target == "serving"]
        assert sum(senders) <= 1, "two live copies"
        assert (self.sender == "source") == (self.source == "serving")
        assert (self.sender == "target") == (self.target == "serving")

    @invariant()
    def the_log_decides(self) -> None:
        if self._decided("committed"):
            assert not self._decided("rolled_back")
            assert self.source != "serving", "back after the commit"
        else:
            assert self.target != "serving", "forward before the commit"
            assert self.source != "gone", "the source is gone before the commit"
        ends = [self._decided(end) for end in ("completed", "rolled_back", "failed")]
        assert sum(ends) <= 1

    @invariant()
    def replay_sees_the_same(self) -> None:
        if self.state is not None:
            state = None
            for event in self.log:
                state, _ = handle(state, event)
            assert state == self.state

    @invariant()
    def a_repeated_entry_changes_nothing_decided(self) -> None:
        if self.state is not None:
            again, _ = handle(self.state, self.log[-1])
            assert again.phase is self.state.phase or not isinstance(self.log[-1], ev.Decision)

    def teardown(self) -> None:
        """The faults stop: everybody runs, every call arrives, time passes; it ends, with one live copy."""
        if self.state is None:
            self.coordinator_starts()
        for _ in range(STEPS_TO_THE_END):
            if self.unlocked:
                break
            if not self._next_step():
                assert self.timer is not None, "nothing is left to do"
                self.time_is_up()
        assert self.unlocked, "it does not end"
        assert self.state is not None
        alive = [self.source == "serving", self.target == "serving"]
        if self.state.gave_up:
            # All its attempts were used up before the faults stopped; a person is told.
            tries = [event for event in self.log if isinstance(event, ev.TimedOut) and event.phase in LAST_PHASES]
            assert len(tries) >= min(ABORT_ATTEMPTS, RESUME_ATTEMPTS)
            assert self.state.reason is not None
            assert sum(alive) == 1 or self.state.reason.code == "nobody_serves"
            return
        assert sum(alive) == 1, (self.source, self.target, self.state.outcome)
        assert (self.target == "serving") == (self.state.outcome == "completed")
        if self.target == "serving":
            assert self.source == "gone", "the source was left behind"
        else:
            assert self.target == "none", "the target was left behind"
            assert not self.armed, "a server that stays is still armed"
        assert not self.images, "images were left behind"
        assert not self.parked, "a socket was left behind"


Migration.TestCase.settings = settings(max_examples=examples(200), stateful_step_count=40, deadline=None)
TestMigration = Migration.TestCase
