"""An event loop on which no time passes: where it would wait, its clock is put forward instead."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.skipped = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None:
            self.skipped += max(timeout, 0.0)
            timeout = 0
        return super().select(timeout)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.skipped


def run(main: Coroutine[Any, Any, None]) -> None:
    """``asyncio.run``, with hours that take no time."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main)
