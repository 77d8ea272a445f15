"""A migration's log, summed up."""

from __future__ import annotations

import pytest

from quicferry.migration.report import report
from quicferry.protocol import events as ev
from tests.unit.test_machine import ARRIVED, BASE, DUMPED, ERROR, request


def test_a_completed_move() -> None:
    more = ev.ClientArrived(**BASE, client="c1", source="application", interruption_ms=44.04)
    other = ev.ClientArrived(**BASE, client="c2", source="wrapper", interruption_ms=60)
    summary = report([request(), *ARRIVED, more, other, ev.Completed(**BASE, arrived=2)])
    assert (summary.outcome, summary.clients, summary.acks) == ("completed", 2, 1)
    assert (summary.interruption_ms, summary.worst_interruption_ms) == (52.0, 60.0)
    assert (summary.frozen_ms, summary.restore_ms) == (20, 18)


def test_a_wrapper_does_not_overrule_its_application() -> None:
    first = ev.ClientArrived(**BASE, client="c1", source="application", interruption_ms=44)
    later = ev.ClientArrived(**BASE, client="c1", source="wrapper", interruption_ms=1)
    assert report([request(), first, later]).interruption_ms == 44


def test_a_move_called_off() -> None:
    summary = report([request(), *DUMPED, ev.RolledBack(**BASE, reason=ERROR)])
    assert (summary.outcome, summary.reason, summary.interruption_ms) == ("rolled_back", ERROR, None)


def test_what_is_no_log() -> None:
    with pytest.raises(ValueError, match="begins"):
        report([])
