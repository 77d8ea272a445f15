"""``quicferry events``, ``replay`` and ``export``: a migration's log, read back from NATS or from a file."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from quicferry.cli import arguments, describe, logfile, session, timeline
from quicferry.cli.exits import Exit, ExitError
from quicferry.cli.logfile import Entry
from quicferry.cli.output import Cell, Output, Row
from quicferry.migration.machine import outstanding
from quicferry.migration.replay import Step, replay
from quicferry.protocol import events as ev
from quicferry.protocol.errors import FerryError

SOURCE_HELP = "a migration's id, or a file that `export` wrote, or - for standard input"


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("events", parents=parents, help="a migration's log as a timeline")
    parser.add_argument("log", metavar="ID|FILE", help=SOURCE_HELP)
    parser.set_defaults(run=run_events)
    parser = commands.add_parser(
        "replay",
        parents=parents,
        help="feed a log through the state machine; fail where its decisions differ",
        description="Shows the state after each entry and the commands the state machine gives for it.",
    )
    parser.add_argument("log", metavar="ID|FILE", help=SOURCE_HELP)
    parser.set_defaults(run=run_replay)
    parser = commands.add_parser("export", parents=parents, help="write a log to a file, one JSON object a line")
    parser.add_argument("id", metavar="ID", type=arguments.name)
    parser.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    parser.set_defaults(run=run_export)


def load(args: argparse.Namespace) -> tuple[str, list[Entry]]:
    """The log that ID|FILE names. An existing file goes before an id; ``-`` is standard input."""
    given: str = args.log
    if given == "-":
        return logfile.read(None)
    is_id = logfile.looks_like_id(given)
    try:
        there = Path(given).exists()
    except OSError as error:  # no file can have that name, or a folder on the way may not be entered
        if not is_id:
            raise FerryError(
                "file_refused",
                f"{given} can't be read: {error.strerror or error}.",
                hint="`quicferry export ID -o FILE` writes a log; `quicferry status` lists ids.",
            ) from None
        there = False
    if there:
        return logfile.read(Path(given))
    if not is_id:
        raise FerryError(
            "file_refused",
            f"{given} does not exist, and can't be a migration's id.",
            hint="An id has letters, digits, _ and - only; `quicferry status` lists them.",
        )
    return given, asyncio.run(session.read_log(args, given))


def run_events(args: argparse.Namespace, out: Output) -> int:
    _, entries = load(args)
    timeline.show(out, entries)
    return Exit.DONE


def run_replay(args: argparse.Namespace, out: Output) -> int:
    migration, entries = load(args)
    try:
        steps = replay(entry.event for entry in entries)
    except ValueError as error:
        raise FerryError("log_unreadable", f"The log is incomplete: {error}.") from None
    show_replay(out, migration, entries, steps)
    differing = [entry.seq for entry, step in zip(entries, steps, strict=True) if step.differs]
    if not differing:
        return Exit.DONE
    number = describe.count(len(differing), "decision")
    raise ExitError(
        Exit.DIFFERS,
        "replay_differs",
        f"{number} of {migration} would not have been taken: entry {', '.join(str(seq) for seq in differing)}.",
        hint="The log was tampered with, or written by another version of quicferry; `export` it before it ages out.",
    )


def show_replay(out: Output, migration: str, entries: Sequence[Entry], steps: Sequence[Step]) -> None:
    """Each entry, the phase after it, the commands given; and what the last state still wants."""
    last = steps[-1].state
    differences = sum(1 for step in steps if step.differs)
    open_commands = [] if last.outcome else outstanding(last)
    if out.as_json:
        for entry, step in zip(entries, steps, strict=True):
            out.record(
                {
                    "seq": entry.seq,
                    "event": step.event,
                    "phase": step.state.phase,
                    "commands": step.commands,
                    "differs": step.differs,
                    "state": step.state,
                }
            )
        result = {
            "id": migration,
            "entries": len(steps),
            "differences": differences,
            "phase": last.phase,
            "outcome": last.outcome,
            "outstanding": open_commands,
        }
        out.record({"result": result})
        return
    out.table(("seq", "entry", "phase after", "commands"), _replay_rows(entries, steps), right=(0,))
    out.line()
    verdict = "every decision is the machine's" if not differences else f"{differences} differ"
    outcome = (last.outcome or f"still {last.phase.value}").replace("_", " ")
    out.line(f"{describe.count(len(steps), 'entry').replace('entrys', 'entries')}, {outcome}; {verdict}")
    if open_commands:
        out.line(f"still wanted: {', '.join(describe.command(command) for command in open_commands)}")


def _replay_rows(entries: Sequence[Entry], steps: Sequence[Step]) -> Iterator[Row]:
    for entry, step in zip(entries, steps, strict=True):
        kind = ev.kind(step.event)
        style = "bold" if kind.startswith("decision.") else ""
        commands = ", ".join(describe.command(command) for command in step.commands)
        yield str(entry.seq), Cell(kind, style), step.state.phase.value, Cell(commands, "cyan")
        if step.differs:
            yield "", Cell("DIFFERS", "bold red"), "", Cell(step.differs, "red")


def run_export(args: argparse.Namespace, out: Output) -> int:
    entries = asyncio.run(session.read_log(args, args.id))
    if args.output in (None, "-"):
        for line in logfile.encode(args.id, entries):
            sys.stdout.write(line.decode())
        return Exit.DONE
    logfile.write(Path(args.output), args.id, entries, force=args.force)
    if out.as_json:
        out.record({"result": {"id": args.id, "file": args.output, "entries": len(entries)}})
    out.line(f"{len(entries)} entries of {args.id} written to {args.output}")
    return Exit.DONE
