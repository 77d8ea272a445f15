"""What the soak judges and prints, without a soak."""

from __future__ import annotations

from tests.soak import logs, report
from tests.soak.leaks import MIB, Reading, trends
from tests.soak.record import Fault, Life, Move, Result, Violation

TRACEBACK = """\
2026 [info     ] target_left id=soak1-1
Traceback (most recent call last):
  File "agent.py", line 1, in step
ValueError: no
2026 [info     ] target_left id=soak1-2
"""


def readings(*figures: tuple[int, int], threads: int = 1, every: float = 60.0) -> list[Reading]:
    """One a minute and ten moves, from (descriptors, MiB)."""
    return [
        Reading(at=number * every, moves=number * 10, fds=fds, threads=threads, memory=mib * MIB)
        for number, (fds, mib) in enumerate(figures)
    ]


def leaks(*figures: tuple[int, int]) -> list[str]:
    return [trend.what for trend in trends("agent", readings(*figures)) if trend.leak]


def test_what_stays_as_it_is_is_no_leak() -> None:
    assert leaks(*[(8, 40)] * 12) == []


def test_too_few_readings_say_nothing() -> None:
    assert trends("agent", readings(*[(8, 40)] * 7)) == []


def test_a_life_too_short_for_memory_is_judged_by_its_descriptors() -> None:
    found = trends("agent", readings(*[(number, number) for number in range(12)], every=10.0))
    assert [(trend.what, trend.leak) for trend in found] == [("fds", True), ("threads", False)]


def test_one_descriptor_a_reading_is_a_leak() -> None:
    assert leaks(*[(8 + number, 40) for number in range(20)]) == ["fds"]


def test_a_descriptor_more_or_less_is_none() -> None:
    assert leaks(*[(8 + number % 3, 40) for number in range(20)]) == []


def test_one_reading_among_many_decides_nothing() -> None:
    figures = [(8, 40)] * 20
    figures[-1] = (99, 400)
    assert leaks(*figures) == []


def test_memory_is_a_leak_when_it_is_both_much_and_a_tenth_more() -> None:
    assert leaks(*[(8, 40 + 2 * number) for number in range(20)]) == ["memory"]
    assert leaks(*[(8, 40 + number // 4) for number in range(20)]) == []  # not much
    assert leaks(*[(8, 1000 + 2 * number) for number in range(20)]) == []  # not a tenth


def test_what_a_process_takes_to_warm_up_does_not_count() -> None:
    assert leaks(*[(8, 10 * number) for number in range(5)], *[(8, 50)] * 15) == []


def test_the_slope_is_per_move() -> None:
    (fds, *_) = trends("agent", readings(*[(8 + 5 * number, 40) for number in range(20)]))
    assert round(fds.per_move, 6) == 0.5


def test_a_move_gets_the_faults_that_were_at_work_meanwhile() -> None:
    result = _result()
    result.moves = [Move(id="a", service="s", began=1.0, ended=2.0), Move(id="b", service="s", began=5.0)]
    result.faults = [
        Fault(kind="before", detail="", began=0.1, ended=0.9),
        Fault(kind="across", detail="", began=1.5, ended=5.5),
        Fault(kind="between", detail="", began=2.5, ended=4.5),
        Fault(kind="goes on", detail="", began=6.0),
    ]
    result.attribute()
    assert [move.faults for move in result.moves] == [["across"], ["across", "goes on"]]


def test_percentiles_are_figures_that_were_measured() -> None:
    figures = [float(number) for number in range(100, 0, -1)]
    assert [report.percentile(figures, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert report.percentile([7.0], 0.5) == 7.0


def test_a_clean_soak_says_so_and_its_lines_fit() -> None:
    result = _result()
    text = report.page(result)
    assert result.clean
    assert "clean: no violation, no leak" in text
    assert max(len(line) for line in text.splitlines()) <= report.WIDTH


def test_what_was_wrong_is_told_with_its_evidence_and_the_seed() -> None:
    result = _result()
    life = Life(process="restore_agent", number=4, calm=readings(*[(8 + n, 40) for n in range(20)]))
    result.lives, result.trends = [life], trends("restore_agent", life.calm)
    result.violations = [Violation(at=12.0, what="2 servers serve " * 9, service="soak1", migration="soak1-7")]
    result.violations.append(Violation(at=13.0, what="short", evidence="/tmp/x/02-soak.txt"))
    text = report.page(result)
    assert not result.clean
    assert "LEAK  restore_agent: fds" in text
    assert "VIOLATION  12 s soak1 soak1-7" in text
    assert "/tmp/x/02-soak.txt" in text
    assert text.count("2 servers serve") + text.count("2 servers\n") >= 8  # wrapped, and all of it
    assert "seed 7" in text.splitlines()[-1]
    assert max(len(line) for line in text.splitlines()) <= report.WIDTH


def test_moves_are_told_by_outcome_and_by_what_was_at_work() -> None:
    result = _result()
    result.moves = [
        Move(id="a", service="s", began=0, ended=1, outcome="completed", gaps_ms=[50.0, 70.0]),
        Move(id="b", service="s", began=0, ended=1, outcome="completed", faults=["NATS killed"], gaps_ms=[900.0]),
        Move(id="c", service="s", began=0, ended=1, outcome="rolled_back", code="cancelled", cancelled=True),
    ]
    lines = [line.split() for line in report.page(result).splitlines()]
    assert ["completed", "1", "-", "1", "2"] in lines
    assert ["rolled_back:", "cancelled", "-", "1", "-", "1"] in lines
    assert ["completed,", "no", "fault", "2", "50", "70", "70", "70"] in lines
    assert ["completed,", "with", "a", "fault", "1", "900", "900", "900", "900"] in lines


def test_a_log_may_not_hold_a_traceback() -> None:
    (found,) = logs.defects(TRACEBACK)
    assert found.startswith("Traceback")
    assert "ValueError: no" in found
    assert logs.defects("2026 [warning  ] step_failed code=internal\n") == []
    assert logs.defects("2026 [error    ] write_given_up id=a what=place\n") != []


def test_a_traceback_that_was_planted_is_none() -> None:
    assert logs.defects(TRACEBACK.replace("agent.py", "shared/quicferry/faults.py")) == []


def test_what_a_planted_failure_led_to_is_excused_with_it() -> None:
    frames = "".join(f'  File "asyncio/tasks.py", line {number}, in wait\n' for number in range(50))
    chain = (
        "2026-11-24T16:27:57.0 [error    ] step_failed code=phase_timeout\nTraceback (most recent call last):\n File "
        f'"shared/quicferry/faults.py", line 43, in at\n{frames}CancelledError\n\nThe above exception was the direct '
        "cause of the following exception:\n\nTraceback (most recent call last):\nTimeoutError\n"
    )
    after = "2026-11-24T16:27:57.2 [info     ] target_left\n"
    assert logs.defects(chain + after) == []
    assert logs.defects(chain + after + chain.replace(frames, "") + after) == []
    assert logs.defects(chain.replace(frames, "") + after + chain + after) == []
    assert len(logs.defects(chain + after + TRACEBACK)) == 1
    assert len(logs.defects(chain.replace(frames, "") + after + TRACEBACK)) == 1, "hidden by the one before it"


def _result() -> Result:
    return Result(seed=7, seconds=60.0, services=2, clients=3)
