"""``quicferry doctor``: what this machine lacks, what that costs, and the fix."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quicferry.cli import arguments, describe, project
from quicferry.cli.exits import Exit
from quicferry.cli.output import Cell, Output
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.host.preflight import Check


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        parents=parents,
        help="what this machine lacks, and the fix",
        description="Looks at this machine and says what to do about what is missing. Ends with 1 when something is "
        "needed. Touches nothing, but runs one short-lived container if the image is there.",
    )
    parser.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace, out: Output) -> int:
    from quicferry.bus.settings import NatsSettings
    from quicferry.host import preflight

    try:
        directory = project.directory(args)
    except FerryError:
        if args.project or "QUICFERRY_PROJECT" in os.environ:
            raise
        directory = None  # outside a checkout the machine can still be looked at
    url = NatsSettings.load(url=args.nats, context=args.context).servers[0]
    checks = preflight.checks(directory, nats_url=url)
    show_checks(out, checks)
    missing = preflight.unfit(checks)
    return Exit.ERROR if missing else Exit.DONE


def show_checks(out: Output, checks: Sequence[Check]) -> None:
    """A table of the checks, then what to do about those that failed."""
    needed = [check for check in checks if check.ok is False and check.level == "required"]
    if out.as_json:
        out.record({"result": {"ok": not needed, "checks": checks}})
        return
    out.table(("", "check", "found"), ((_mark(check), check.name, check.found) for check in checks), keep=1)
    for check in checks:
        if check.ok is not False:
            continue
        out.line()
        out.line(_mark(check), " ", Cell(check.name, "bold"), f": {check.why}")
        out.line(f"  what to do: {check.fix}")
    out.line()
    wanting = sum(1 for check in checks if check.ok is False and check.level == "optional")
    if needed:
        out.line(Cell(f"{describe.count(len(needed), 'thing')} missing that quicferry needs", "bold red"))
    elif wanting:
        out.line(f"fit; {describe.count(wanting, 'thing')} missing that it can do without")
    else:
        out.line(Cell("fit", "bold green"))


def _mark(check: Check) -> Cell:
    """Words, not colours alone."""
    if check.ok is None:
        return Cell("-", "dim")
    if check.ok:
        return Cell("ok", "green")
    return Cell("NEEDED", "bold red") if check.level == "required" else Cell("lacks", "yellow")
