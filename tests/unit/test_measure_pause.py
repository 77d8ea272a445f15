"""The landmarks of a move in what the kernel's tracer says of it."""

from __future__ import annotations

import pytest

from tests.measure_pause import STEPS, landmarks, parse

AGENT, DUMPS, RESTORES, SERVER = 10, 20, 30, 40
PEEKS = "3, 0, 0, 22, 0, 0"
MOVE = (
    (RESTORES, 1.0, 45, PEEKS, 115),  # asked for the restore
    (RESTORES, 2.0, 0, "6, 7f00, 1000, 0, 0, 0", 86, 5.0),  # waits for the inventory, up to 7
    (DUMPS, 3.0, 45, PEEKS, 4),
    (DUMPS, 4.0, 101, "4206, 1388, 0, 0, 0, 0", 0),
    (DUMPS, 6.0, 1, "3, 7f00, 11, 0, 0, 0", 17),
    (RESTORES, 8.0, 1, "3, 7f00, 17, 0, 0, 0", 23),
    (RESTORES, 9.0, 101, "4206, 1388, 0, 0, 0, 0", 0),  # catches the restored tasks
    (RESTORES, 10.0, 1, "3, 7f00, 12, 0, 0, 0", 18),
    (RESTORES, 11.0, 45, PEEKS, 4),
    (RESTORES, 12.0, 101, "11, 1388, 0, 0, 0, 0", 0),
    (AGENT, 13.0, 47, "e, 7f00, 0, 0, 0, 0", 50),
    (SERVER, 14.0, 47, "8, 7f00, 0, 0, 0, 0", 152),
    (SERVER, 15.0, 44, "8, 7f00, 20, 0, 0, 0", 32),  # to the agent: a connected socket has no address
    (SERVER, 16.0, 44, "9, 7f00, 21, 0, 7ffc, 10", 33),
)


def lines(*, without: int = -1) -> list[str]:
    """The tracer's own form, sorted by time."""
    said: list[tuple[float, str]] = []
    for number, (pid, at, call, arguments, result, *took) in enumerate(MOVE):
        if number != without:
            head, end = f"            criu-{pid} [001] .....", at + (took[0] if took else 0.001)
            said.append((at, f"{head} {at:.6f}: sys_enter: NR {call} ({arguments})"))
            said.append((end, f"{head} {end:.6f}: sys_exit: NR {call} = {result}"))
    return ["# tracer: nop", *(line for _, line in sorted(said))]


def test_the_landmarks_of_a_move() -> None:
    found = landmarks(list(parse(lines())), frozenset({AGENT}))
    assert {name: round(at) for name, at in found.items()} == {
        "asked": 1,
        "waiting": 2,
        "let go": 3,
        "frozen": 4,
        "dumped": 6,
        "inventory": 7,
        "restored": 8,
        "last stage": 10,
        "acknowledged": 11,
        "running": 12,
        "socket": 14,
        "answered": 16,
    }
    assert [name for name, _ in STEPS[1:]] == [name for name in found if name in dict(STEPS)]


DECOYS = (9.0, 13.0, 15.0)
"""When what is no landmark happens: it is only there to be mistaken for one."""


@pytest.mark.parametrize("missing", [number for number, (_, at, *_) in enumerate(MOVE) if at not in DECOYS])
def test_a_missing_landmark_is_no_figure(missing: int) -> None:
    with pytest.raises((StopIteration, ValueError)):
        landmarks(list(parse(lines(without=missing))), frozenset({AGENT}))
