"""``quicferry migrate`` and ``cancel``: ask for a move, and follow it through its log."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from rich.progress import Progress, SpinnerColumn, TextColumn

from quicferry.cli import arguments, describe, session
from quicferry.cli.exits import OUTCOMES, Exit, ExitError
from quicferry.cli.logfile import Entry
from quicferry.cli.output import Cell, Output
from quicferry.cli.phases import Narrator, PhaseDone
from quicferry.cli.timeline import moment_of
from quicferry.migration.report import report
from quicferry.protocol import subjects
from quicferry.protocol.api import CancelReply, CancelRequest, MigrateReply, MigrateRequest, Options
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.bus.connection import Bus

WAIT_SECONDS: Final = 180.0
"""Above what the state machine allows itself with its default limits."""
MS_MOST: Final = 3_600_000
UNANSWERED: Final = ("no_answer", "not_leading", "nats_unreachable")
"""After these nobody can say whether the request was heard."""
STYLES: Final = {"completed": "bold green", "rolled_back": "bold yellow", "failed": "bold red"}


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "migrate",
        parents=parents,
        help="move a service to another berth and show the phases",
        description="Moves a running server to another berth. Waits for the end and shows each phase as it is over.",
    )
    parser.add_argument("service", metavar="SERVICE", nargs="?", type=arguments.name, help="default: the only one")
    parser.add_argument("--to", metavar="[NODE/]BERTH", type=arguments.berth, help="default: an empty berth")
    parser.add_argument("--id", type=arguments.name, help="the migration's id; the same id twice is one migration")
    parser.add_argument("--detach", action="store_true", help="print the id and do not wait")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=arguments.seconds,
        default=WAIT_SECONDS,
        help="seconds to wait for the end (default: %(default)g)",
    )
    parser.add_argument(
        "--pre-copy", metavar="N", type=arguments.integer(0, 8), help="rounds of pre-dump while the server serves"
    )
    limits = Options()
    for limit, what in (
        ("ack", "how long the server waits for its clients' acks"),
        ("quiesce", "how long applications may take to become quiet"),
        ("phase", "how long any phase before the commit may take"),
        ("settle", "how long clients may take to arrive"),
    ):
        default = getattr(limits, f"{limit}_timeout_ms")
        parser.add_argument(
            f"--{limit}-timeout-ms",
            metavar="MS",
            type=arguments.integer(0, MS_MOST),
            help=f"{what} (default: {default})",
        )
    parser.set_defaults(run=run_migrate)

    parser = commands.add_parser(
        "cancel", parents=parents, help="call a migration off, as long as it is not committed"
    )
    parser.add_argument("id", metavar="ID", type=arguments.name)
    parser.set_defaults(run=run_cancel)


def run_migrate(args: argparse.Namespace, out: Output) -> int:
    move = Move(args, out)
    try:
        return asyncio.run(move.run())
    except KeyboardInterrupt:
        if move.id is None:
            raise
        raise move.left_running(Exit.INTERRUPTED, f"Stopped watching; the migration {move.id} goes on.") from None


class Move:
    """One migration as this command sees it."""

    def __init__(self, args: argparse.Namespace, out: Output) -> None:
        self.args = args
        self.out = out
        self.id: str | None = None
        """Set once the request may have been heard."""
        self._narrator = Narrator()
        self._start_ms = self._latest_ms = 0

    async def run(self) -> int:
        async with session.connected(self.args) as bus:
            reply = await self._request(bus)
            if self.args.detach:
                self._detached(reply)
                return Exit.DONE
            try:
                async with asyncio.timeout(self.args.timeout):
                    await self._follow(bus, reply)
            except TimeoutError:
                what = (
                    f"{reply.id} is not over after {self.args.timeout:g} s; it is {self._narrator.phase} and goes on."
                )
                raise self.left_running(Exit.STILL_RUNNING, what) from None
            except FerryError as error:
                if error.code.startswith("nats_"):
                    error.hint = f"{error.hint} The migration {reply.id} goes on without this command.".strip()
                raise
        return self._end()

    def left_running(self, exit_code: Exit, what: str) -> ExitError:
        hint = f"`quicferry status {self.id}` looks at it, `quicferry cancel {self.id}` calls it off."
        return ExitError(exit_code, "still_running", what, hint=hint)

    async def _request(self, bus: Bus) -> MigrateReply:
        service = self.args.service or (await session.the_service(bus, None)).service
        request = MigrateRequest(
            service=service,
            to=self.args.to,
            id=self.args.id or make_id(service),
            options=options(self.args),
        )
        self.id = request.id
        try:
            return await session.ask(bus, subjects.MIGRATE, request, MigrateReply)
        except FerryError as error:
            if error.code in UNANSWERED:
                error.hint = (
                    f"{error.hint} The request may have been heard all the same: `quicferry status {request.id}` "
                    f"tells; asked for again with --id {request.id} it is the same move."
                ).strip()
            else:
                self.id = None
            raise

    def _detached(self, reply: MigrateReply) -> None:
        if self.out.as_json:
            self.out.record({"result": reply})
            return
        self._head(reply)
        self.out.line(f"  look at it with: quicferry status {reply.id}")

    def _head(self, reply: MigrateReply) -> None:
        way = f"  {reply.service} from {describe.place(reply.source)} to {describe.place(reply.target)}"
        self.out.line(Cell(reply.id, "bold"), way)

    async def _follow(self, bus: Bus, reply: MigrateReply) -> None:
        from quicferry.bus.log import EventLog

        self._head(reply)
        log = await EventLog.open(bus)
        with _progress(self.out) as progress:
            progress.now(self._narrator.phase)
            async with contextlib.aclosing(log.follow(migration=reply.id)) as entries:
                async for entry in entries:
                    self._take(Entry(entry.seq, entry.event))
                    progress.now(self._narrator.phase)
                    if self._narrator.outcome is not None:
                        return

    def _take(self, entry: Entry) -> None:
        if not self._narrator.events:
            self._start_ms = self._latest_ms = entry.event.at_ms
        done = self._narrator.feed(entry)
        if self.out.as_json:
            self.out.record(moment_of(entry, start_ms=self._start_ms, latest_ms=self._latest_ms))
        elif done:
            self.out.line(*phase_line(done))
        self._latest_ms = max(self._latest_ms, entry.event.at_ms)

    def _end(self) -> Exit:
        result = report(self._narrator.events)
        outcome = result.outcome or ""
        if self.out.as_json:
            self.out.record({"result": result})
            return OUTCOMES[outcome]
        self.out.line(Cell(describe.verdict(result), STYLES[outcome]))
        if result.reason:
            self.out.line(f"  why: {describe.error_line(result.reason)}")
            if result.reason.hint:
                self.out.line(f"  what to do: {result.reason.hint}")
            self.out.line(f"  the whole story: quicferry events {result.id}")
        return OUTCOMES[outcome]


def make_id(service: str) -> str:
    """Of the form that the coordinator makes. Made here, the request is known by it even if its answer is lost."""
    return f"{service[:40]}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def options(args: argparse.Namespace) -> Options:
    """The request's options from the flags that were given."""
    given = {
        "pre_copy_rounds": args.pre_copy,
        "ack_timeout_ms": args.ack_timeout_ms,
        "quiesce_timeout_ms": args.quiesce_timeout_ms,
        "phase_timeout_ms": args.phase_timeout_ms,
        "settle_timeout_ms": args.settle_timeout_ms,
    }
    return Options(**{key: value for key, value in given.items() if value is not None})


def phase_line(done: PhaseDone) -> tuple[str | Cell, ...]:
    """One line for a phase that is over."""
    return (f"  {done.phase:<11} {done.took_ms:>6,} ms", Cell(f"  {done.detail}" if done.detail else "", "dim"))


class _Shows(Protocol):
    def now(self, phase: str) -> None: ...


class _Nothing:
    def now(self, phase: str) -> None:
        pass


class _Spinner:
    """The phase that runs and how long it has, below the lines of those that are over."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._phase = ""

    def now(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._progress.reset(self._task, description=phase)


@contextlib.contextmanager
def _progress(out: Output) -> Iterator[_Shows]:
    if not out.live:
        yield _Nothing()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description:<11} {task.elapsed:7.1f} s"))
    with Progress(*columns, console=out.console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        yield _Spinner(bar)


def run_cancel(args: argparse.Namespace, out: Output) -> int:
    return asyncio.run(_cancel(args, out))


async def _cancel(args: argparse.Namespace, out: Output) -> int:
    async with session.connected(args) as bus:
        reply = await session.ask(bus, subjects.CANCEL, CancelRequest(id=args.id), CancelReply)
    if out.as_json:
        out.record({"result": reply})
    if (ended := OUTCOMES.get(reply.phase)) is not None:
        how = Cell(reply.phase.replace("_", " "), STYLES[reply.phase])
        out.line(f"{reply.id} has ended, there is nothing to call off: ", how)
        out.line(f"  why: quicferry status {reply.id}")
        return ended
    out.line(f"asked to call off {reply.id} while {reply.phase}; quicferry status {reply.id} shows how it ends")
    return Exit.DONE
