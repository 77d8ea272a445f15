"""A service process: logging, clean stop on SIGTERM or SIGINT, and an exit status that tells."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from quicferry import logging
from quicferry.protocol.errors import FerryError

log = structlog.get_logger()

STOP_SECONDS: Final = 1.8
"""How long the work may take to stop; then it is left where it is. The log decides, so nothing is lost."""


def main(name: str, work: Callable[[], Awaitable[None]]) -> int:
    """Run ``work`` until SIGTERM or SIGINT, then cancel it.

    Returns the exit status: 0 when stopped by a signal, 1 when the work ended by itself or failed.
    """
    logging.configure(name)
    with asyncio.Runner() as runner:
        return runner.run(_run(name, work))


async def _run(name: str, work: Callable[[], Awaitable[None]]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("starting", service=name)
    working = asyncio.ensure_future(work())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({working}, timeout=STOP_SECONDS)
        log.info("stopped", service=name)
        return 0
    try:
        await working
        log.error("ended", service=name, error="the work ended by itself")
    except FerryError as error:
        log.error("ended", service=name, code=error.code, error=error.message, hint=error.hint)
    except BaseExceptionGroup as group:
        ours, others = group.split(FerryError)
        for leaf in _leaves(ours) if ours else ():
            log.error("ended", service=name, error=str(leaf))
        if others:
            log.error("ended", service=name, exc_info=others)
    except Exception:  # the last place where a defect can be told
        log.exception("ended", service=name)
    return 1


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
