"""The state machine: one path forward, one back, and no state from which neither is open."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quicferry.bus.agent import longest_step
from quicferry.migration.commands import ArmServer, CallAgent, Command, Decide, Place, StartTimer, StopTimer, Unlock
from quicferry.migration.machine import Phase, State, handle, outstanding, wanted
from quicferry.migration.retries import ABORT_ATTEMPTS, RESUME_ATTEMPTS, UNSERVED_ATTEMPTS, last_attempt
from quicferry.protocol import events as ev
from quicferry.protocol.api import Address, Options
from quicferry.protocol.api import Place as Berth
from quicferry.protocol.errors import ErrorBody

A = Berth(node="n", berth="a", address=Address(host="127.0.0.1", port=14242))
B = Berth(node="n", berth="b", address=Address(host="127.0.0.1", port=14243))
BASE = {"id": "m1", "at_ms": 0}
ERROR = ErrorBody(code="criu_failed", message="no")


def request(**options: int) -> ev.Requested:
    return ev.Requested(**BASE, service="echo", source=A, target=B, epoch=1, options=Options(**options))


def run(*events: ev.AnyEvent, **options: int) -> tuple[State, list[Command]]:
    state, commands = handle(None, request(**options))
    for event in events:
        state, commands = handle(state, event)
    return state, commands


READY = (ev.SourceReady(**BASE, image="i", rss_bytes=1), ev.TargetReady(**BASE, image="i"))
PREPARED = (*READY, ev.Prepared(**BASE))
ARMED = (*PREPARED, ev.Armed(**BASE, clients=2))
ACKED = (*ARMED, ev.MigrateSent(**BASE, clients=2), ev.AckSeen(**BASE, client="c1", after_ms=1))
HELD = (*ACKED, ev.SourceHeld(**BASE, waited_ms=3))
DUMPED = (*HELD, ev.Dumped(**BASE, pages=5, image_bytes=9, took_ms=22))
RESTORED = (*DUMPED, ev.Restored(**BASE, took_ms=19))
COMMITTED = (*RESTORED, ev.Committed(**BASE))
RESUMED = (*COMMITTED, ev.Resumed(**BASE, took_ms=1, queued=0, restore_ms=18), ev.SourceGone(**BASE, frozen_ms=20))
ARRIVED = (
    *RESUMED,
    ev.Adopted(**BASE, outcome="moved", still_ms=50),
    ev.ClientArrived(**BASE, client="c1", source="wrapper", interruption_ms=40),
)


def names(commands: list[Command]) -> list[str]:
    return [
        command.name
        if isinstance(command, CallAgent | ArmServer)
        else command.decision
        if isinstance(command, Decide)
        else type(command).__name__
        for command in commands
    ]


@pytest.mark.parametrize(
    ("events", "phase", "expected"),
    [
        ((), Phase.PREPARING, ["checkpoint.prepare", "restore.prepare", "StartTimer"]),
        (READY, Phase.PREPARING, ["prepared"]),
        (PREPARED, Phase.ARMING, ["server.arm", "StartTimer"]),
        (ARMED, Phase.DUMPING, ["restore.restore", "checkpoint.dump", "StartTimer"]),
        (HELD, Phase.DUMPING, []),
        (DUMPED, Phase.RESTORING, ["StartTimer"]),
        (RESTORED, Phase.COMMITTING, ["committed", "StopTimer"]),
        (COMMITTED, Phase.RESUMING, ["restore.resume", "StartTimer"]),
        (RESUMED[:-1], Phase.RESUMING, ["checkpoint.release", "Place"]),
        (RESUMED, Phase.SETTLING, ["StartTimer"]),
        (ARRIVED, Phase.SETTLING, ["completed", "StopTimer"]),
        ((*ARRIVED, ev.Completed(**BASE, arrived=1)), Phase.ENDED, ["Unlock"]),
    ],
)
def test_the_way_forward(events: tuple[ev.AnyEvent, ...], phase: Phase, expected: list[str]) -> None:
    state, commands = run(*events)
    assert state.phase is phase
    assert names(commands) == expected


def test_clients_that_never_arrive_do_not_hold_up_completion() -> None:
    state, commands = run(*RESUMED, ev.TimedOut(**BASE, phase="settling"))
    assert commands == [Decide(decision="completed", arrived=0), StopTimer()]
    assert state.phase is Phase.SETTLING


FAILURES: list[ev.AnyEvent] = [
    ev.CheckpointFailed(**BASE, verb="dump", attempt=1, error=ERROR),
    ev.RestoreFailed(**BASE, verb="restore", attempt=1, error=ERROR),
    ev.CallFailed(**BASE, to="restore.prepare", attempt=1, error=ERROR),
    ev.CancelAsked(**BASE),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("before", [(), READY, PREPARED, ARMED, ACKED, HELD, DUMPED])
def test_every_failure_before_restored_leads_back(before: tuple[ev.AnyEvent, ...], failure: ev.AnyEvent) -> None:
    state, commands = run(*before, failure)
    assert state.phase is Phase.ABORTING
    assert "restore.abort" in names(commands)
    untold = before in ((), READY, PREPARED[:2])
    # The agent before the server: its SIGTERM would end a server that has just been disarmed.
    assert "checkpoint.abort" in names(commands)
    assert "server.disarm" not in names(commands)
    state, _ = handle(state, ev.TargetCleared(**BASE))
    state, commands = handle(state, ev.SourceBack(**BASE))
    if not state.disarmed:
        assert names(commands) == ["server.disarm"]
        state, commands = handle(state, ev.Disarmed(**BASE))
    decision = "failed" if untold else "rolled_back"
    assert commands == [Decide(decision=decision, reason=state.reason), StopTimer()]


@pytest.mark.parametrize("failure", [*FAILURES, ev.TimedOut(**BASE, phase="committing")])
@pytest.mark.parametrize("before", [RESTORED, COMMITTED, RESUMED])
def test_no_failure_turns_back_once_the_commit_is_wanted(
    before: tuple[ev.AnyEvent, ...], failure: ev.AnyEvent
) -> None:
    state, commands = run(*before, failure)
    assert state == run(*before)[0]
    assert commands == []


def test_a_replaced_timer_that_fires_is_ignored() -> None:
    state, commands = run(*PREPARED, ev.TimedOut(**BASE, phase="preparing"))
    assert (state.phase, commands) == (Phase.ARMING, [])


def test_images_must_be_equal() -> None:
    state, _ = run(ev.SourceReady(**BASE, image="i", rss_bytes=1), ev.TargetReady(**BASE, image="j"))
    assert state.reason is not None
    assert state.reason.code == "image_mismatch"


def in_vain(state: State, commands: list[Command]) -> tuple[State, list[tuple[float, list[str]]], list[Command]]:
    """Let every attempt of the phase time out: the state then, each attempt's wait and calls, the last commands."""
    waits = []
    while timers := [command for command in commands if isinstance(command, StartTimer)]:
        waits.append((timers[0].seconds, [name for name in names(commands) if "." in name]))
        timed_out = ev.TimedOut(**BASE, phase=state.phase.value, attempt=state.attempt)
        state, commands = handle(state, timed_out)
        assert handle(state, timed_out)[0] == state, "the same timeout twice"
    return state, waits, commands


def reason(commands: list[Command]) -> ErrorBody:
    """Why it failed."""
    (failed, _) = commands
    assert isinstance(failed, Decide)
    assert (failed.decision, commands[1:]) == ("failed", [StopTimer()])
    assert failed.reason is not None
    return failed.reason


HOUR = 3600.0


@pytest.mark.parametrize("before", [ARMED, ACKED, HELD, DUMPED])
def test_an_abort_that_nobody_takes_goes_on_for_an_hour_and_ends(before: tuple[ev.AnyEvent, ...]) -> None:
    """An agent that is away: without it, what stands still is not brought back."""
    _, waits, commands = in_vain(*run(*before, FAILURES[0]))
    assert [calls for _, calls in waits] == [["restore.abort", "checkpoint.abort"]] * UNSERVED_ATTEMPTS
    seconds = [wait for wait, _ in waits]
    assert seconds[:3] == [5, 10, 15]
    assert seconds == sorted(seconds)
    assert max(seconds) == 60
    assert 0.9 * HOUR < sum(seconds) < 1.2 * HOUR
    why = reason(commands)
    assert why.code == "nobody_serves"
    assert ("stands still in berth n/a" if HELD[-1] in before else "may stand still in berth n/a") in why.message
    assert ERROR.message in why.message
    assert "restart" in why.hint


@pytest.mark.parametrize("before", [(), PREPARED])
def test_an_abort_while_the_server_serves_is_given_up_soon(before: tuple[ev.AnyEvent, ...]) -> None:
    """It was not armed, so it does not stand still: nobody need wait for an agent that is not there."""
    _, waits, commands = in_vain(*run(*before, FAILURES[0]))
    assert [seconds for seconds, _ in waits] == [5] * ABORT_ATTEMPTS
    assert reason(commands) == ERROR


@pytest.mark.parametrize("vain", [0, 50])
def test_an_abort_is_given_up_soon_once_the_source_is_back(vain: int) -> None:
    state, commands = run(*DUMPED, FAILURES[0])
    for attempt in range(1, vain + 1):
        state, _ = handle(state, ev.TimedOut(**BASE, phase="aborting", attempt=attempt))
    state, commands = handle(state, ev.SourceBack(**BASE))
    assert last_attempt(state) == vain + 1 + ABORT_ATTEMPTS
    if vain:  # not what was left of a long wait
        assert commands == [StartTimer(phase="aborting", seconds=5, attempt=vain + 1)]
    _, waits, commands = in_vain(state, wanted(state))
    assert [calls for _, calls in waits] == [["restore.abort"]] * (ABORT_ATTEMPTS + 1)
    assert reason(commands) == ERROR


@pytest.mark.parametrize(("limit_ms", "first"), [(10_000, [10, 10, 10, 15]), (300, [0.3, 5, 10, 15])])
def test_a_resume_that_nobody_takes_goes_on_for_an_hour_and_ends(limit_ms: int, first: list[float]) -> None:
    """The source is kept until it has worked, or until nothing is left to try."""
    _, waits, commands = in_vain(*run(*COMMITTED, phase_timeout_ms=limit_ms))
    seconds = [wait for wait, _ in waits]
    assert seconds[:4] == first
    assert 0.9 * HOUR < sum(seconds) < 1.2 * HOUR
    *others, last = [calls for _, calls in waits]
    assert others == [["restore.resume"]] * (UNSERVED_ATTEMPTS - 1)
    assert last == ["restore.resume", "checkpoint.release"]
    why = reason(commands)
    assert why.code == "nobody_serves"
    assert "serve in berth n/b" in why.message
    assert "still in berth n/a" in why.message


def test_a_source_that_nobody_ends_is_given_up_soon_while_the_target_serves() -> None:
    state, _ = run(*RESUMED[:-1])
    _, waits, commands = in_vain(state, wanted(state))
    assert [calls for _, calls in waits] == [["checkpoint.release"]] * (RESUME_ATTEMPTS + 1)
    assert {seconds for seconds, _ in waits} == {10}
    why = reason(commands)
    assert (why.code, "serves in berth n/b" in why.message) == ("phase_timeout", True)
    assert "n/a" in why.hint


@pytest.mark.parametrize(
    ("verb", "before", "limit_ms"),
    [
        *(("release", RESUMED[:-1], limit_ms) for limit_ms in (1, 1_500, 10_000, 60_000)),
        *(("resume", COMMITTED, limit_ms) for limit_ms in (1, 1_500, 10_000, 60_000)),
        *(("abort", (*DUMPED, FAILURES[0]), limit_ms) for limit_ms in (1, 1_500, 10_000, 60_000)),
        *(("abort", (*PREPARED, FAILURES[0]), limit_ms) for limit_ms in (1, 1_500, 10_000)),
    ],
)
def test_a_step_that_hangs_is_ended_before_its_migration_is_given_up(
    verb: str, before: tuple[ev.AnyEvent, ...], limit_ms: int
) -> None:
    state, _ = run(*before, phase_timeout_ms=limit_ms)
    _, waits, _ = in_vain(state, wanted(state))
    assert sum(seconds for seconds, _ in waits[:-1]) >= longest_step(verb, state.request.options)


def test_waits_as_long_as_its_request_allows() -> None:
    """A limit above the longest wait is the wait."""
    _, waits, _ = in_vain(*run(*COMMITTED, phase_timeout_ms=90_000))
    assert {seconds for seconds, _ in waits} == {90}


def test_pre_copy_rounds_end_when_told_when_small_and_when_growing() -> None:
    def after(*pages: int) -> Phase:
        rounds = [ev.PreDumped(**BASE, round=n, pages=p, took_ms=1) for n, p in enumerate(pages, 1)]
        return run(*PREPARED, *rounds, pre_copy_rounds=3)[0].phase

    assert after() is Phase.PRE_COPYING
    assert after(5000) is Phase.PRE_COPYING
    assert after(5000, 900) is Phase.PRE_COPYING
    assert after(5000, 900, 800) is Phase.ARMING
    assert after(64) is Phase.ARMING
    assert after(900, 1000) is Phase.ARMING


def test_a_pre_copy_round_that_is_reported_again_does_not_reopen_them() -> None:
    rounds = [ev.PreDumped(**BASE, round=n, pages=900 // n, took_ms=1) for n in (1, 2)]
    state, _ = run(*PREPARED, *rounds, pre_copy_rounds=2)
    assert state.phase is Phase.ARMING
    assert handle(state, rounds[0]) == (state, [])


def test_a_log_begins_with_its_request() -> None:
    with pytest.raises(ValueError, match="begins with"):
        handle(None, ev.Prepared(**BASE))


# Whatever the agents say, in whatever order.

error = st.just(ERROR)
client = st.sampled_from(["c1", "c2", "c3"])
anything = st.one_of(
    st.sampled_from([*ARRIVED, *FAILURES]),
    st.builds(ev.AckSeen, id=st.just("m1"), at_ms=st.just(0), client=client, after_ms=st.just(1.0)),
    st.builds(
        ev.ClientArrived,
        id=st.just("m1"),
        at_ms=st.just(0),
        client=client,
        source=st.just("wrapper"),
        interruption_ms=st.just(1.0),
    ),
    st.sampled_from(
        [
            ev.SourceBack(**BASE),
            ev.TargetCleared(**BASE),
            ev.Disarmed(**BASE),
            ev.PreDumped(**BASE, round=1, pages=9, took_ms=1),
        ]
    ),
    st.builds(
        ev.TimedOut,
        id=st.just("m1"),
        at_ms=st.just(0),
        phase=st.sampled_from([phase.value for phase in Phase]),
        attempt=st.integers(1, 11),
    ),
).filter(lambda event: not isinstance(event, ev.Decision))


def decide(command: Decide) -> ev.AnyEvent:
    match command.decision:
        case "prepared":
            return ev.Prepared(**BASE)
        case "committed":
            return ev.Committed(**BASE)
        case "completed":
            return ev.Completed(**BASE, arrived=command.arrived)
        case "rolled_back":
            assert command.reason
            return ev.RolledBack(**BASE, reason=command.reason)
        case "failed":
            assert command.reason
            return ev.Failed(**BASE, reason=command.reason)


@settings(max_examples=400)
@given(st.lists(st.tuples(anything, st.booleans()), max_size=60), st.integers(0, 3))
def test_any_order_keeps_the_invariants(script: list[tuple[ev.AnyEvent, bool]], rounds: int) -> None:
    state, given_ = handle(None, request(pre_copy_rounds=rounds))
    decided: list[str] = []
    in_flight = [command for command in given_ if isinstance(command, Decide)]
    for event, land in script:
        before = state
        state, commands = handle(state, event)
        in_flight += [command for command in commands if isinstance(command, Decide)]
        # Never asks to serve in the target before the commit, nor to bring the source back after it.
        if not state.committed:
            assert not {"restore.resume", "checkpoint.release"} & set(names(commands))
        if state.committed or state.phase is Phase.COMMITTING:
            assert not {"restore.abort", "checkpoint.abort", "server.disarm"} & set(names(wanted(state)))
        assert Place() not in commands or state.committed
        # What is given again after a restart covers what this event gave.
        assert all(command in outstanding(state) for command in commands if not isinstance(command, StopTimer))
        assert len([c for c in outstanding(state) if isinstance(c, StartTimer)]) <= 1
        if before.outcome is not None:
            assert state == before
        if land and in_flight and state.outcome is None:
            # The coordinator's decision lands, however late; the log takes the first one at each place.
            command = in_flight.pop(0)
            in_flight.clear()
            if command in wanted(state):
                decided.append(command.decision)
                state, commands = handle(state, decide(command))
                in_flight += [c for c in commands if isinstance(c, Decide)]
    assert not ("committed" in decided and "rolled_back" in decided)
    assert decided.count("committed") <= 1


@settings(max_examples=200)
@given(st.lists(anything, max_size=40))
def test_it_can_always_be_brought_to_an_end(script: list[ev.AnyEvent]) -> None:
    """From wherever agents' words have led, willing agents and timers lead to an outcome."""
    state, _ = handle(None, request())
    for event in script:
        state, _ = handle(state, event)
    answers: dict[str, list[ev.AnyEvent]] = {
        "checkpoint.prepare": [READY[0]],
        "restore.prepare": [READY[1]],
        "server.arm": [ARMED[-1]],
        "server.disarm": [ev.Disarmed(**BASE)],
        "checkpoint.dump": [DUMPED[-1]],
        "restore.restore": [RESTORED[-1]],
        "restore.resume": [RESUMED[-2]],
        "checkpoint.release": [RESUMED[-1]],
        "checkpoint.abort": [ev.SourceBack(**BASE)],
        "restore.abort": [ev.TargetCleared(**BASE)],
    }
    for _ in range(40):
        if state.outcome is not None:
            break
        command = wanted(state)[0]
        if state.phase is Phase.SETTLING and not state.settled:
            command = wanted(state)[-1]
        match command:
            case CallAgent() | ArmServer():
                replies = answers[command.name]
            case Decide():
                replies = [decide(command)]
            case StartTimer():
                replies = [ev.TimedOut(**BASE, phase=command.phase, attempt=command.attempt)]
            case Place():
                replies = [decide(c) for c in wanted(state) if isinstance(c, Decide)]
            case _:
                pytest.fail(f"stuck in {state.phase} wanting {command}")
        for reply in replies:
            state, _ = handle(state, reply)
    assert state.outcome is not None
    assert Unlock() in wanted(state)


def test_a_restore_that_is_reported_before_its_dump_commits_only_after_it() -> None:
    """Two agents write into the log: whose word comes first is not theirs to say."""
    state, commands = run(*HELD, ev.Restored(**BASE, took_ms=19))
    assert (state.phase, commands) == (Phase.DUMPING, [])
    state, commands = handle(state, DUMPED[-1])
    assert state.phase is Phase.COMMITTING
    assert names(commands) == ["committed", "StopTimer"]
