"""Changes to an input that leave most of it what it is: values in its JSON, its lines, its bytes.

The decoder is C, without coverage to lead a fuzzer: noise alone never gets past it.
"""

from __future__ import annotations

import json
import random
from typing import Any, Final

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 8, 9, 65_535, 65_536, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1e-300, 1e300, -1e300, 3_600_000, 3_600_001),
    *("", "a", "a" * 64, "a" * 65, "a.b", "a\n", "*", ">", "\0", "\x1b[2J", "é", "٣", "²", "\U0001f6a2", "\u202e"),
    *("::1", "::", "0.0.0.0", "255.255.255.255", "fe80::1%99999999999", "fe80::1%0", "::ffff:127.0.0.1", "1.2.3.4%5"),
    *("x" * 5000, "m1", "1", "01", " 1", "1_0", [], [[]], {}, {"a": 1}),
)


def mutated(data: bytes, chance: random.Random, most_bytes: int = 16_384) -> bytes:
    """``data``, changed in one to four places."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        data = chance.choice((_json, _json, _json, _lines, _bytes))(data, chance)
    return data[:most_bytes]


def _json(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    # A control stream's first byte is none of its first line.
    fitting = [n for n, line in enumerate(lines) if line[:1] == b"{" or (n == 0 and line[1:2] == b"{")]
    if not fitting:
        return _bytes(data, chance)
    number = chance.choice(fitting)
    skip = lines[number].index(b"{")
    try:
        value = json.loads(lines[number][skip:])
    except (ValueError, RecursionError):
        return _bytes(data, chance)
    changed = json.dumps(_changed(value, chance), separators=(",", ":")).encode()
    lines[number] = lines[number][:skip] + changed
    return b"\n".join(lines)


def _changed(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        match chance.randrange(8):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                fresh = chance.choice(VALUES)
                return {fresh if name == key and isinstance(fresh, str) else name: v for name, v in value.items()}
            case _:
                return {**value, key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], _changed(value[place], chance), *value[place + chance.randrange(2) :]]
    return chance.choice(VALUES)


def _lines(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    match chance.randrange(4):
        case 0:
            lines[one], lines[other] = lines[other], lines[one]
        case 1:
            lines[one:one] = [lines[other]] * chance.choice((1, 1, 2, 70))
        case 2:
            del lines[one]
        case _:
            lines[one] = lines[one][: chance.randrange(len(lines[one]) + 1)]
    return b"\n".join(lines)


def _bytes(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) + 1)
    fresh = chance.choice(
        (b"", b"\xff", b"\0", b"{", b"[" * 2000, b"}", b'"', b"\\ud800", b"\n", chance.randbytes(4))
    )
    return data[:place] + fresh + data[place + chance.choice((0, 1, 1, 5)) :]
