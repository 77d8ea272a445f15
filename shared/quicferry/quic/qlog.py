"""The QUIC trace: written as qlog, bounded in memory, and read for what a move must not change.

qlog is draft-ietf-quic-qlog-main-schema-02 with aioquic's event names; times are Unix time in milliseconds.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec
from aioquic.quic.logger import QuicLogger, QuicLoggerTrace

KEPT_EVENTS: Final = 4096
"""Newest events of a trace kept in memory; older ones are in the file, or gone if there is none."""
KEPT_WINDOWS: Final = 65_536
"""Changes of the congestion window kept."""
LONG_HEADERS: Final = ("initial", "handshake", "0RTT", "retry")
SETTLE: Final = 1.0
"""Seconds after the target's first packet in which a loss would still be the move's doing."""


class Windows(msgspec.Struct):
    """A connection's congestion window over time, and its handshakes; times in seconds, Unix time."""

    odcid: str
    """The connection's original destination id: a rebuilt connection has another one."""
    handshakes: int = 0
    """1 once a handshake packet was received; a second handshake would be a second connection."""
    last_handshake_at: float = 0.0
    """When the last packet with a long header (RFC 9000, 17.2) was sent or received."""
    lost: int = 0
    """Packets declared lost (RFC 9002, 6): what was in them is sent again."""
    timeline: deque[tuple[float, int]] = msgspec.field(default_factory=lambda: deque(maxlen=KEPT_WINDOWS))
    """(time, congestion window in bytes), one a change."""

    def see(self, event: dict[str, Any]) -> None:
        """Take one qlog event into account."""
        name, data, at = event["name"], event["data"], event["time"] / 1000
        if name in ("transport:packet_sent", "transport:packet_received"):
            kind = data["header"].get("packet_type")
            if kind in LONG_HEADERS:
                self.last_handshake_at = at
                if kind == "handshake" and name == "transport:packet_received":
                    self.handshakes = 1
        elif name == "recovery:packet_lost":
            self.lost += 1
        elif (
            name == "recovery:metrics_updated"
            and "cwnd" in data
            and (not self.timeline or self.timeline[-1][1] != data["cwnd"])
        ):
            self.timeline.append((at, data["cwnd"]))

    def before(self, at: float) -> int:
        """The congestion window in force at time ``at``; 0 if none was logged by then."""
        found = 0
        for when, window in self.timeline:
            if when > at:
                break
            found = window
        return found

    def lowest(self, since: float, until: float) -> int:
        """The smallest congestion window in force between two times."""
        return min([self.before(since), *(window for when, window in self.timeline if since < when <= until)])


class Trace(QuicLoggerTrace):
    """One connection's trace. aioquic fills an event's frames after logging it, so events are written late."""

    def __init__(self, *, is_client: bool, odcid: bytes, directory: Path | None) -> None:
        super().__init__(is_client=is_client, odcid=odcid)
        self.windows = Windows(odcid=odcid.hex())
        self._file: TextIO | None = None
        if directory is not None:
            self._file = (directory / f"{odcid.hex()}.sqlog").open("w", encoding="utf-8")
            self._write(
                {
                    "qlog_format": "NDJSON",
                    "qlog_version": "0.3",
                    "trace": {"common_fields": {"ODCID": odcid.hex()}, "vantage_point": self._vantage_point},
                }
            )

    def log_event(self, *, category: str, event: str, data: dict[str, Any]) -> None:
        super().log_event(category=category, event=event, data=data)
        self.windows.see(self._events[-1])
        if len(self._events) >= 2 * KEPT_EVENTS:
            self._spill(KEPT_EVENTS)

    def finish(self) -> None:
        """Write what is left and close the file; safe to repeat."""
        self._spill(len(self._events))
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self, count: int) -> None:
        for _ in range(count):
            event = self._events.popleft()
            if self._file is not None:
                self._write(event)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


class Traces(QuicLogger):
    """Every connection's trace; with a directory each is also a file, ``<ODCID>.sqlog``."""

    def __init__(self, directory: str | Path | None = None) -> None:
        """Raises OSError if the directory can't be made."""
        super().__init__()
        self._directory = Path(directory) if directory is not None else None
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
        self.all: list[Trace] = []

    def start_trace(self, is_client: bool, odcid: bytes) -> QuicLoggerTrace:
        trace = Trace(is_client=is_client, odcid=odcid, directory=self._directory)
        self.all.append(trace)
        return trace

    def end_trace(self, trace: QuicLoggerTrace) -> None:
        if isinstance(trace, Trace):
            trace.finish()

    def close(self) -> None:
        """Finish every trace, also of connections that never ended."""
        for trace in self.all:
            trace.finish()

    @property
    def handshakes(self) -> int:
        """How many connections were established, one handshake each."""
        return sum(trace.windows.handshakes for trace in self.all)


def read(path: Path) -> Windows:
    """A trace from a file, ours (one event a line) or aioquic's own (one JSON document).

    Raises ValueError if it is neither.
    """
    with path.open(encoding="utf-8") as file:
        first = json.loads(file.readline())
        if "traces" in first:
            trace = first["traces"][0]
            odcid, stored = trace["common_fields"]["ODCID"], iter(trace["events"])
        else:
            odcid, stored = first["trace"]["common_fields"]["ODCID"], (json.loads(line) for line in file)
        return _windows(odcid, stored)


def _windows(odcid: str, stored: Iterable[dict[str, Any]]) -> Windows:
    windows = Windows(odcid=odcid)
    for event in stored:
        windows.see(event)
    return windows
