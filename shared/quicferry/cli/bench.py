"""``quicferry bench``: repeated moves under load beside the alternatives, as a table, JSON and plots."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from quicferry.cli import arguments, client, lifecycle, project, results, session
from quicferry.cli.exits import Exit
from quicferry.cli.output import Output
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.bench.figures import Result
    from quicferry.bench.run import Plan
    from quicferry.host.compose import Stack

VARIANTS: Final = ("ferry", "copied", "source-order", "reconnect", "podman", "floor")
CONNECTIONS: Final = (1, 10, 100, 500)
MEMORY: Final = (20, 100, 400, 1024)


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        parents=parents,
        conflict_handler="resolve",
        help="the pause in figures, beside the alternatives",
        description="Moves a server many times under a client that pings every 2 ms, in every way there is, one of "
        "each in turn, and prints the pauses. Brings the system up if none is, and takes down what it brought up. "
        "docs/performance.md explains the figures.",
    )
    parser.add_argument("--moves", type=arguments.integer(1, 1000), help="of each variant (10; quick: 2)")
    parser.add_argument(
        "--variants", type=_names, metavar="A,B", help=f"which ways; all by default: {','.join(VARIANTS)}"
    )
    parser.add_argument(
        "--connections",
        type=_numbers(1, 2000),
        metavar="N,N",
        help="the curve over connections (1,10,100,500); 0: none",
    )
    parser.add_argument(
        "--memory", type=_numbers(20, 8192), metavar="MB,MB", help="the curve over memory (20,100,400,1024); 0: none"
    )
    parser.add_argument("--quick", action="store_true", help="few moves and short curves, for CI")
    parser.add_argument("--json", metavar="FILE", dest="result", help="write the result there, - for standard output")
    parser.add_argument("--plots", metavar="DIR", help="write the plots there, SVG and PNG")
    parser.add_argument("--report", metavar="FILE", help="measure nothing: tables (and --plots) of an earlier result")
    parser.add_argument("--into", metavar="FILE", help="put the tables into that Markdown file, between its marks")
    parser.add_argument("--service", type=arguments.name, help="default: the only one")
    parser.add_argument("--keep", action="store_true", help="leave the system up")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace, out: Output) -> int:
    from quicferry.bench import figures, tables

    out.as_json = args.result == "-"
    file = Path(args.result) if args.result not in (None, "-") else None
    page = Path(args.into) if args.into else None
    _check(file, page, args.plots)
    result = _read(args.report) if args.report else _measure(args, out)
    try:
        if file is not None:
            results.write(file, figures.write(result))
        if page is not None:
            results.write(page, tables.insert(results.read_text(page), result).encode())
            out.note(f"wrote {page}")
    except FerryError as error:  # a disk that is full by now, a page whose marks went: the result must not go with it
        out.record(result)
        error.hint = f"{error.hint} The result is on standard output.".strip()
        raise
    if out.as_json:
        out.record(result)
    elif page is None:
        for line in tables.markdown(result).splitlines():
            out.line(line)
    if args.plots:
        from quicferry.bench import plots

        for path in plots.draw(result, Path(args.plots)):
            out.note(f"wrote {path}")
    return Exit.DONE


def _check(file: Path | None, page: Path | None, folder: str | None) -> None:
    """Whether everything asked for can be written. Raises FerryError ``file_refused`` and those of the writers."""
    if file is not None:
        results.check(file)
    if page is not None:
        from quicferry.bench import tables

        tables.split(results.read_text(page))
        results.check(page)
    if folder is not None:
        from quicferry.bench import plots

        plots.check(Path(folder))


def _measure(args: argparse.Namespace, out: Output) -> Result:
    ours = lifecycle.stack(args, out)
    was_up = bool(ours.containers())
    plan = _plan(args)
    if was_up:
        plan = _lasting_nothing(args, plan, out)
    try:
        lifecycle.bring_up(args, ours)
        return asyncio.run(_bench(args, plan, ours, out))
    finally:
        if not was_up and not args.keep:
            ours.down(volumes=True)


async def _bench(args: argparse.Namespace, plan: Plan, ours: Stack, out: Output) -> Result:
    from quicferry.bench import run

    async with session.connected(args) as bus:
        service = await session.the_service(bus, args.service)
        bench = run.Bench(
            bus=bus,
            stack=ours,
            project=project.directory(args),
            cafile=client.find_cafile(ours),
            service=service.service,
            say=out.note,
        )
        return await bench.run(plan, command=shlex.join(["quicferry", *sys.argv[1:]]))


def _plan(args: argparse.Namespace) -> Plan:
    from quicferry.bench.run import Plan

    quick = args.quick
    return Plan(
        moves=args.moves or (2 if quick else 10),
        bulk_moves=1 if quick else 3,
        curve_moves=2 if quick else 5,
        variants=args.variants or VARIANTS,
        connections=args.connections if args.connections is not None else (1, 10) if quick else CONNECTIONS,
        memory=args.memory if args.memory is not None else (20, 100) if quick else MEMORY,
    )


def _lasting_nothing(args: argparse.Namespace, plan: Plan, out: Output) -> Plan:
    """The plan without what is a service of its own and was not asked for: the log of a system that stays would know
    that for 30 days."""
    if args.memory is None and plan.memory:
        out.note("the system was up: no curve over memory (--memory asks for it all the same)")
        plan = msgspec.structs.replace(plan, memory=())
    if args.variants is None:
        out.note("the system was up: no variant copied (--variants asks for it all the same)")
        plan = msgspec.structs.replace(plan, variants=tuple(name for name in plan.variants if name != "copied"))
    return plan


def _read(path: str) -> Result:
    from quicferry.bench.figures import Result

    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Result)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FerryError(
            "file_refused",
            f"{path} is no benchmark's result: {error}.",
            hint="`quicferry bench --json FILE` writes one.",
        ) from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if wrong := sorted(set(names) - set(VARIANTS)):
        raise argparse.ArgumentTypeError(f"there is no variant {wrong[0]!r}; there are {', '.join(VARIANTS)}")
    return names


def _numbers(least: int, most: int) -> Callable[[str], tuple[int, ...]]:
    one = arguments.integer(least, most)

    def parse(text: str) -> tuple[int, ...]:
        return () if text == "0" else tuple(sorted({one(part) for part in text.split(",")}))

    return parse
