"""Replay finds a log whose decisions are not the machine's."""

from __future__ import annotations

import pytest

from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from tests.unit.test_machine import ARRIVED, BASE, DUMPED, ERROR, FAILURES, READY, request

END = ev.Completed(**BASE, arrived=1)


def differences(*events: ev.AnyEvent) -> list[str]:
    return [step.differs for step in replay([request(), *events]) if step.differs]


def test_a_true_log_replays() -> None:
    steps = replay([request(), *ARRIVED, END])
    assert not any(step.differs for step in steps)
    assert steps[-1].state.outcome == "completed"
    assert steps[0].commands


def test_a_true_log_of_a_rollback_replays() -> None:
    back = (FAILURES[0], ev.TargetCleared(**BASE), ev.SourceBack(**BASE), ev.RolledBack(**BASE, reason=ERROR))
    assert differences(*DUMPED, *back) == []


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ((*DUMPED, ev.Committed(**BASE)), "the machine wants no decision"),
        ((*ARRIVED, ev.Completed(**BASE, arrived=7)), "7 clients logged"),
        ((*ARRIVED, ev.RolledBack(**BASE, reason=ERROR)), "the machine wants completed"),
        ((*ARRIVED, request()), "requested once"),
    ],
)
def test_a_forged_decision_is_found(events: tuple[ev.AnyEvent, ...], says: str) -> None:
    assert says in " ".join(differences(*events))


def test_a_decision_that_a_timeout_has_overtaken_is_none_of_those() -> None:
    late = (ev.TimedOut(**BASE, phase="preparing", attempt=1), ev.Prepared(**BASE))
    assert differences(*READY, *late) == []
    assert differences(READY[0], *late) != [], "it was never asked for"


def test_a_reason_that_differs_is_found() -> None:
    back = (FAILURES[3], ev.TargetCleared(**BASE), ev.SourceBack(**BASE), ev.RolledBack(**BASE, reason=ERROR))
    assert "machine's" in " ".join(differences(*DUMPED, *back))
