"""How hard tests search: little in CI, a hundredfold with HYPOTHESIS_PROFILE=long."""

from __future__ import annotations

import os
from typing import Final

LONG: Final = os.environ.get("HYPOTHESIS_PROFILE", "") == "long"


def examples(number: int) -> int:
    """For hypothesis' ``max_examples``: ``number`` in CI."""
    return number * 100 if LONG else number
