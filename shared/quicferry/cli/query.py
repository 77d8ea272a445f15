"""``quicferry status`` and ``services``: what runs, and what is where."""

from __future__ import annotations

import argparse
import asyncio
import time

from msgspec.structs import replace

from quicferry.cli import arguments, describe, session
from quicferry.cli.exits import Exit
from quicferry.cli.output import Cell, Output
from quicferry.protocol import subjects
from quicferry.protocol.api import MigrationStatus, ServicesReply, StatusReply, StatusRequest

STYLES = {"completed": "green", "rolled_back": "yellow", "failed": "red"}


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("status", parents=parents, help="one migration, or the newest ones")
    parser.add_argument("id", metavar="ID", nargs="?", type=arguments.name)
    parser.add_argument("--service", type=arguments.name, help="only migrations of this service")
    parser.add_argument(
        "--limit", metavar="N", type=arguments.integer(1, 100), default=10, help="how many (default: %(default)s)"
    )
    parser.set_defaults(run=run_status)
    parser = commands.add_parser("services", parents=parents, help="where each service is, and every berth")
    parser.set_defaults(run=run_services)


def run_status(args: argparse.Namespace, out: Output) -> int:
    request = StatusRequest(id=args.id, service=args.service, limit=args.limit)
    reply = asyncio.run(_status(args, request))
    if out.as_json:
        out.record(reply)
        return Exit.DONE
    if not reply.migrations:
        out.line("no migrations yet; `quicferry migrate` starts one")
        return Exit.DONE
    now_ms = time.time_ns() // 1_000_000
    show_status(out, reply.migrations, now_ms)
    if reply.leader and not args.id:
        out.line(Cell(f"coordinator: {reply.leader}", "dim"))
    if args.id:
        for status in reply.migrations:
            if status.reason:
                out.line(f"why: {describe.error_line(status.reason)}")
                if status.reason.hint:
                    out.line(f"what to do: {status.reason.hint}")
    return Exit.DONE


async def _status(args: argparse.Namespace, request: StatusRequest) -> StatusReply:
    async with session.connected(args) as bus:
        return await session.ask(bus, subjects.STATUS, request, StatusReply)


def show_status(out: Output, migrations: list[MigrationStatus], now_ms: int) -> None:
    """A table, one migration a row; ``now_ms`` is Unix time."""
    out.table(
        ("id", "service", "from", "to", "state", "acks", "age"),
        (
            (
                Cell(status.id, "bold"),
                status.service,
                describe.place(status.source),
                describe.place(status.target),
                Cell((status.outcome or status.phase).replace("_", " "), STYLES.get(status.outcome or "", "cyan")),
                f"{status.acks}/{status.clients}",
                describe.age((now_ms - status.requested_ms) / 1000),
            )
            for status in migrations
        ),
        keep=0,
    )


def run_services(args: argparse.Namespace, out: Output) -> int:
    reply = asyncio.run(_services(args))
    if out.as_json:
        out.record(reply)
        return Exit.DONE
    show_services(out, reply, time.time_ns() // 1_000_000)
    return Exit.DONE


async def _services(args: argparse.Namespace) -> ServicesReply:
    async with session.connected(args) as bus:
        reply = await session.services(bus)
    return replace(reply, services=session.reported(reply))


def show_services(out: Output, reply: ServicesReply, now_ms: int) -> None:
    """Two tables: services and berths."""
    if not reply.services:
        out.line("no service is known yet; agents look for berths every few seconds")
    else:
        out.table(
            ("service", "berth", "address", "epoch", "put there by"),
            (
                (
                    Cell(placement.service, "bold"),
                    describe.place(placement.place),
                    describe.address(placement.place.address),
                    str(placement.epoch),
                    placement.migration or "its first start",
                )
                for placement in reply.services
            ),
            right=(3,),
            keep=4,
        )
    if reply.berths:
        out.line()
        out.table(
            ("berth", "service", "address", "holds", "image", "seen"),
            (
                (
                    f"{berth.node}/{berth.berth}",
                    berth.service,
                    describe.address(berth.address),
                    Cell("a server", "bold") if berth.occupied else "nothing",
                    describe.image(berth.image),
                    describe.age((now_ms - berth.seen_ms) / 1000) + " ago",
                )
                for berth in reply.berths
            ),
            keep=0,
        )
