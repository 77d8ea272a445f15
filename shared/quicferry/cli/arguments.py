"""Types of arguments, for argparse: what is wrong is said before anything is sent."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

import msgspec

from quicferry.protocol.wire import Name

_TO = re.compile(r"([A-Za-z0-9_-]{1,64}/)?[A-Za-z0-9_-]{1,64}")

Commands = Any
"""What ``add_subparsers`` returns; argparse has no public name for it."""


def name(text: str) -> str:
    """A service, berth or migration id."""
    try:
        return msgspec.convert(text, Name)
    except msgspec.ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is no name: 1 to 64 letters, digits, _ and -") from None


def berth(text: str) -> str:
    """``BERTH`` or ``NODE/BERTH``."""
    if not _TO.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither BERTH nor NODE/BERTH")
    return text


def integer(least: int, most: int) -> Callable[[str], int]:
    """A whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return value

    return parse


def seconds(text: str) -> float:
    """A positive number of seconds, up to a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, up to 86400")
    return value
