"""Two coordinators' clocks, however wrong, never let both act; and who is gone does not hold the lead for long."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.lease import LEASE, MARGIN, RENEW, Seen, Tenure, Vigil


def record(holder: str = "one", revision: int = 1, renewal: int = 1, lease: float = LEASE) -> Seen:
    return Seen(holder, revision, renewal, lease)


def test_nobody_acts_before_the_first_renewal() -> None:
    assert Tenure().left(0.0) == 0.0
    assert Vigil().left(1e9) == math.inf


def test_a_tenure_counts_from_the_asking_and_ends_early() -> None:
    tenure = Tenure()
    tenure.renewed(asked_at=100.0)
    assert tenure.left(100.0) == LEASE - MARGIN
    assert tenure.left(100.0 + LEASE - MARGIN) == 0.0
    tenure.renewed(asked_at=99.0)  # an answer that comes out of order takes nothing away
    assert tenure.left(100.0) == LEASE - MARGIN
    tenure.over()
    assert tenure.left(100.0) == 0.0


def test_a_record_that_changes_is_never_free() -> None:
    vigil = Vigil()
    for beat in range(20):
        now = beat * (LEASE - 0.01)
        vigil.see(record(revision=beat, renewal=beat), now)
        assert vigil.left(now + LEASE - 0.02) > 0


def test_a_record_that_stays_is_free_after_its_lease() -> None:
    vigil = Vigil()
    for step in range(6):
        vigil.see(record(), 10.0 + step * LEASE / 5)  # looking at it does not make it younger
    assert vigil.left(10.0 + LEASE - 0.01) > 0
    assert vigil.left(10.0 + LEASE) == 0.0


def test_the_lease_is_the_one_that_its_holder_promised() -> None:
    vigil = Vigil()
    vigil.see(record(lease=LEASE * 3), 0.0)
    assert vigil.left(LEASE * 2) > 0
    assert vigil.left(LEASE * 3) == 0.0


def test_what_was_given_up_is_free_at_once() -> None:
    vigil = Vigil()
    vigil.see(record(), 0.0)
    vigil.see(record(holder="", revision=2, renewal=0, lease=0.0), 0.1)
    assert vigil.left(0.1) == 0.0


def test_another_record_of_the_same_number_is_another_record() -> None:
    """A server that lost its newest writes with the power numbers the next ones as those."""
    vigil = Vigil()
    vigil.see(record(revision=7, renewal=7), 0.0)
    vigil.see(record(revision=7, renewal=3), LEASE)
    assert vigil.left(LEASE) == LEASE


def test_a_new_holder_is_told_once() -> None:
    vigil = Vigil()
    told = [vigil.see(record(holder=name), 0.0) for name in ("one", "one", "two", "two", "one")]
    assert told == [True, False, True, False, True]


def test_two_renewals_may_be_lost() -> None:
    assert RENEW * 3 < LEASE - MARGIN


WAITS = st.sampled_from([0.0, RENEW, 1.0, LEASE])
LOOKS = st.sampled_from([0.1, 0.25, 0.5, 1.0])
"""Seconds; few values, so that every run looks soon after a record was written, and around the end of its lease."""


@given(
    set_by=st.floats(-1e6, 1e6),
    rate=st.floats(1 - MARGIN / LEASE / 2, 1 + MARGIN / LEASE / 2),
    asks=st.lists(st.tuples(WAITS, WAITS, st.booleans()), min_size=1, max_size=3),
    looks=st.lists(LOOKS, min_size=12, max_size=40),
)
def test_both_never_act_at_once(
    set_by: float, rate: float, asks: list[tuple[float, float, bool]], looks: list[float]
) -> None:
    """A leader whose requests and answers take any time or are lost, a standby that looks whenever it gets to it."""
    tenure, vigil = Tenure(), Vigil()
    written: list[float] = []
    asked = 0.0
    for wait, way, answered in asks:
        asked += wait
        # One writer: what was asked for later is written later.
        written.append(max([*written, asked + way]))
        if answered:
            tenure.renewed(asked)
    true = 0.0
    for look in looks:
        true += look
        there = sum(at <= true for at in written)
        if not there:
            continue
        standbys = set_by + true * rate
        vigil.see(record(revision=there, renewal=there), standbys)
        # Before the last one is written, compare-and-set still guards the record: it is about to change.
        if there == len(written) and vigil.left(standbys) == 0.0:
            assert tenure.left(true) == 0.0
