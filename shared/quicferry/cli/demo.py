"""``quicferry demo``: the proof. A client pings, its server moves there and back, the client's qlog tells."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from quicferry.cli import arguments, client, describe, lifecycle, project, results, session
from quicferry.cli.exits import Exit
from quicferry.cli.migrate import make_id
from quicferry.cli.output import Cell, Output
from quicferry.migration.report import Report, report
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import Address, MigrateReply, MigrateRequest
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.bus.connection import Bus

INTERVAL_MS: Final = 5
BETWEEN: Final = 1.0
"""Seconds of pinging before, between and after the moves: the window grows, and a loss would show."""
MOVE_SECONDS: Final = 60.0
CLIENT_SECONDS: Final = 20.0
ATTEMPT_SECONDS: Final = 2.0
"""How long the client may take to connect, to notice a move's end, or to sum up."""
LINE_BYTES: Final = 8 * 1024 * 1024
"""The client's summary is one line, with all moves and every lost echo in it."""


class Move(msgspec.Struct, frozen=True, kw_only=True, rename={"source": "from", "target": "to"}):
    """One move as the demo tells it; times in milliseconds, windows in bytes."""

    id: str
    source: str
    target: str
    outcome: str
    interruption_ms: float | None
    """Last good echo before to first good echo after, by the client's own clock."""
    acks: int
    echoes_sent: int
    echoes_lost: int
    handshakes: int
    """By the client's qlog, over the whole session so far."""
    cwnd_before: int
    cwnd_after: int
    """The smallest within a second after the move."""
    frozen_ms: float | None
    restore_ms: float | None

    @property
    def ok(self) -> bool:
        kept = self.cwnd_before == self.cwnd_after != 0
        return self.outcome == "completed" and self.echoes_lost == 0 and self.handshakes == 1 and kept


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json FILE`` holds."""

    moves: list[Move]
    ok: bool


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        parents=parents,
        conflict_handler="resolve",
        help="the proof: a live server moves there and back",
        description="Brings the system up, connects a client, moves its server from A to B and back while it pings, "
        "and prints a line a move. Ends with 0 only if the QUIC connection was never rebuilt, by the client's qlog. "
        "Takes down what it brought up.",
    )
    parser.add_argument("--json", metavar="FILE", dest="result", help="write the result there, - for standard output")
    parser.add_argument("--moves", type=arguments.integer(1, 1000), default=2, help="how many (default: %(default)s)")
    parser.add_argument("--service", type=arguments.name, help="default: the only one")
    parser.add_argument("--keep", action="store_true", help="leave the system up")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace, out: Output) -> int:
    out.as_json = args.result == "-"
    file = Path(args.result) if args.result not in (None, "-") else None
    if file is not None:
        results.check(file)
    ours = lifecycle.stack(args, out)
    was_up = bool(ours.containers())
    try:
        lifecycle.bring_up(args, ours)
        with tempfile.TemporaryDirectory(prefix="quicferry-qlog-") as traces:
            result = asyncio.run(_demo(args, out, Path(traces)))
    finally:
        if not was_up and not args.keep:
            ours.down(volumes=True)
    if args.result == "-":
        out.record(result)
    verdict = "one connection throughout, nothing lost" if result.ok else "NOT as it should be"
    out.line(Cell(verdict, "bold green" if result.ok else "bold red"))
    if file is not None:
        results.write(file, msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return Exit.DONE if result.ok else Exit.FAILED


async def _demo(args: argparse.Namespace, out: Output, traces: Path) -> Result:
    async with session.connected(args) as bus:
        service = await session.the_service(bus, args.service)
        directory = project.directory(args)
        cafile = client.find_cafile(lifecycle.stack(args, out))
        await _answered(service.place.address, cafile)
        options = ["--qlog", str(traces), "--interval-ms", str(INTERVAL_MS), "--stay-connected", "--name", "demo"]
        command, environment = client.command_line(
            argparse.Namespace(json=True, passed=options),
            directory,
            describe.address(service.place.address),
            cafile,
            os.environ,
        )
        reports: list[Report] = []
        async with _Client.started(command, environment) as car:
            await car.heard("connected")
            began_ms = time.time() * 1000
            for _ in range(args.moves):
                await asyncio.sleep(BETWEEN)  # the client pings all the while
                reports.append(await _move(bus, service.service))
                if reports[-1].outcome != "completed":
                    _explain(out, reports[-1])
                    break
                _show(out, reports[-1], await car.heard(reports[-1].id))
            await asyncio.sleep(BETWEEN)
            summary = await car.stop()
    return _result(reports, summary, car.said, traces, began_ms)


async def _answered(address: Address, cafile: str) -> None:
    """Until the server answers a client. Raises FerryError ``connect_failed``.

    Each attempt has a port of its own: a datagram that was sent before the container's port was mapped leaves an
    entry in the kernel's connection tracking, and everything from that port follows it for minutes.
    """
    import quicferry  # the QUIC stack, which the other commands do without

    end = time.monotonic() + CLIENT_SECONDS
    while True:
        try:
            async with quicferry.connect(
                address.host, address.port, cafile=cafile, server_name="localhost", timeout=ATTEMPT_SECONDS
            ):
                return
        except FerryError as error:
            if error.code != "connect_failed" or time.monotonic() > end:
                raise


async def _move(bus: Bus, service: str) -> Report:
    from quicferry.bus.log import EventLog

    request = MigrateRequest(service=service, id=make_id(service))
    reply = await session.ask(bus, subjects.MIGRATE, request, MigrateReply)
    log = await EventLog.open(bus)
    seen: list[ev.AnyEvent] = []
    try:
        async with asyncio.timeout(MOVE_SECONDS), contextlib.aclosing(log.follow(migration=reply.id)) as entries:
            async for _, event, _ in entries:
                seen.append(event)
                if isinstance(event, ev.Completed | ev.RolledBack | ev.Failed):
                    break
    except TimeoutError:
        raise FerryError(
            "still_running",
            f"The move {reply.id} is not over after {MOVE_SECONDS:g} s.",
            hint=f"`quicferry status {reply.id}` looks at it while the system is up: --keep leaves it up.",
        ) from None
    return report(seen)


def _show(out: Output, move: Report, seen: Mapping[str, Any]) -> None:
    out.line(
        f"{move.source.berth} to {move.target.berth}: ",
        Cell(f"{seen['interruption_ms']:.1f} ms", "bold"),
        f", acks {move.acks}/{move.clients}, lost {seen['unanswered']}, handshakes {seen['handshakes']}, "
        f"frozen {move.frozen_ms or 0:.1f}, restore {move.restore_ms or 0:.1f} ms",
    )


def _explain(out: Output, move: Report) -> None:
    out.line(Cell(describe.verdict(move), "bold red"))
    if move.reason is not None:
        out.line(f"  why: {describe.error_line(move.reason)}")
        out.line(f"  what to do: {move.reason.hint or 'quicferry doctor looks at the machine'}")


def _result(
    reports: list[Report], summary: Mapping[str, Any], seen: Mapping[str, Any], traces: Path, began_ms: float
) -> Result:
    """Put the log's, the client's and the trace's accounts together."""
    from quicferry.quic import qlog

    windows = [qlog.read(path) for path in sorted(traces.glob("*.sqlog"))]
    handshakes = sum(trace.handshakes for trace in windows)
    later = {move["id"]: move for move in summary.get("moves", [])}
    moves: list[Move] = []
    before = 0
    for number, one in enumerate(reports, 1):
        pause = later.get(one.id, {})
        until = seen.get(one.id, {}).get("echoes_sent", before)
        until = summary.get("echoes_sent", until) if number == len(reports) else until
        moves.append(
            Move(
                id=one.id,
                source=describe.place(one.source),
                target=describe.place(one.target),
                outcome=one.outcome or "unknown",
                interruption_ms=pause.get("interruption_ms"),
                acks=one.acks,
                echoes_sent=until - before,
                echoes_lost=sum(1 for echo in summary.get("lost", []) if before < echo <= until),
                handshakes=handshakes,
                cwnd_before=pause.get("cwnd_before", 0),
                cwnd_after=pause.get("cwnd_after", 0),
                frozen_ms=one.frozen_ms,
                restore_ms=one.restore_ms,
            )
        )
        before = until
    # A client that dialled again would have left a second trace; one that shook hands again, a later handshake.
    one_connection = len(windows) == 1 and windows[0].odcid == summary.get("odcid")
    untouched = one_connection and windows[0].last_handshake_at * 1000 < began_ms
    return Result(moves=moves, ok=bool(moves) and untouched and all(move.ok for move in moves))


class _Client:
    """The car client as a process, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.said: dict[str, dict[str, Any]] = {}
        """By event, or for a move by its id: the newest of each."""
        self._news = asyncio.Condition()

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, command: list[str], environment: Mapping[str, str]) -> AsyncIterator[_Client]:
        """Run it; ended at the latest when the block is left."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**environment, "QUICFERRY_LOG_LEVEL": "error"},
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        one = cls(process)
        reading = asyncio.create_task(one._read())
        try:
            yield one
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reading

    async def heard(self, what: str) -> dict[str, Any]:
        """What it says on ``what``, an event or a move's id. Raises FerryError ``setup_failed`` if it does not."""
        try:
            async with asyncio.timeout(CLIENT_SECONDS), self._news:
                await self._news.wait_for(lambda: what in self.said or "over" in self.said)
        except TimeoutError:
            pass
        if what not in self.said:
            raise FerryError("setup_failed", f"The client has not said anything on {what}; it ended or it hangs.")
        return self.said[what]

    async def stop(self) -> dict[str, Any]:
        """End it, with its trace written; returns its summary."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and its summary says how
            self._process.send_signal(signal.SIGINT)
        await self.heard("over")
        return await self.heard("summary")

    async def _read(self) -> None:
        if self._process.stdout is None:
            return
        async for line in self._process.stdout:
            said = json.loads(line)
            await self._note(said["id"] if said["event"] == "move" else said["event"], said)
        await self._note("over", {})

    async def _note(self, key: str, said: dict[str, Any]) -> None:
        async with self._news:
            self.said[key] = said
            self._news.notify_all()
