"""How every service logs: structlog, one event name and its fields a line, on standard error."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Final, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

RENDERED: Final = ("exception", "stack")
"""Fields of many lines."""
LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(service: str = "") -> None:
    """Set up logging for this process.

    ``QUICFERRY_LOG`` is ``text`` (the default) or ``json``; ``QUICFERRY_LOG_LEVEL`` one of :data:`LEVELS`.
    In text there is colour only on a terminal. ``service`` is added to every JSON line; in text the
    collector (podman-compose, systemd) names the process already.
    """
    as_json = os.environ.get("QUICFERRY_LOG", "text").lower() == "json"
    level = LEVELS.get(os.environ.get("QUICFERRY_LOG_LEVEL", "info").lower(), logging.INFO)
    stream = cast(TextIO, _Unbreakable(sys.stderr))  # all that loggers use of one
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Processor]
    if as_json:
        if service:
            shared.append(_Named(service))
        last = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(sort_keys=False)]
    else:
        last = [
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                pad_event_to=0,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One write a line: PrintLogger makes two of an unbuffered stream, and podman logs runs the halves together.
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module: same place, same form, only what matters.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


def _printable(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """What a client or a server said of itself does not steer the terminal that shows the log."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key not in RENDERED:
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


class _Unbreakable(io.TextIOBase):
    """A stream whose reader may go away: what can't be logged is lost, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _Named:
    """Adds the service's name to a line."""

    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event.setdefault("service", self._service)
        return event
