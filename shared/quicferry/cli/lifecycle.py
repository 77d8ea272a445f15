"""``quicferry up``, ``down`` and ``clean``: the whole system through podman-compose."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from quicferry.cli import arguments, describe, project, session
from quicferry.cli.exits import Exit
from quicferry.cli.output import Cell, Output
from quicferry.protocol.api import ServicesReply
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.host.compose import Stack
    from quicferry.host.inventory import Container

UP_SECONDS: Final = 60.0
"""How long the containers may take to run."""
SEEN_SECONDS: Final = 30.0
"""How long a server may take, once its container runs, to be known to the coordinator."""
ASK_EVERY: Final = 0.2


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "up",
        parents=parents,
        help="start NATS, the three services and the berths",
        description="Builds the image if its inputs changed, starts everything, waits until the server can be moved. "
        "Safe to repeat. SRC_PORT, DST_PORT and NATS_PORT choose the ports.",
    )
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=arguments.seconds,
        default=UP_SECONDS,
        help="seconds the containers may take to run (default: %(default)g)",
    )
    parser.set_defaults(run=run_up)
    parser = commands.add_parser("down", parents=parents, help="stop it; the log stays")
    parser.add_argument("--volumes", action="store_true", help="remove the log and the certificates too")
    parser.set_defaults(run=run_down)
    parser = commands.add_parser("clean", parents=parents, help="remove all of ours by label: log and images too")
    parser.add_argument("--keep-images", action="store_true", help="leave the container images")
    parser.set_defaults(run=run_clean)


def stack(args: argparse.Namespace, out: Output) -> Stack:
    """This project's copy of the system; what it does on the way is said on standard error."""
    from quicferry.host.compose import Stack

    return Stack(project.directory(args), say=out.note)


def run_up(args: argparse.Namespace, out: Output) -> int:
    ours = stack(args, out)
    containers, reply = bring_up(args, ours, timeout=args.timeout)
    if out.as_json:
        out.record({"result": {"name": ours.name, "nats": args.nats, "containers": containers, "services": reply}})
        return Exit.DONE
    out.table(
        ("container", "service", "state"),
        sorted((container.name, container.service, container.state) for container in containers),
    )
    for placement in reply.services:
        where = describe.place(placement.place)
        out.line(
            Cell(placement.service, "bold"),
            f" is in {where}; clients dial {describe.address(placement.place.address)}",
        )
    return Exit.DONE


def bring_up(
    args: argparse.Namespace, ours: Stack, *, timeout: float = UP_SECONDS
) -> tuple[list[Container], ServicesReply]:
    """Start everything and wait until a service can be moved; ``args.nats`` then names this copy's NATS."""
    containers = ours.up(timeout=timeout)
    if not args.nats and not args.context and "NATS_URL" not in os.environ:
        args.nats = f"nats://127.0.0.1:{os.environ.get('NATS_PORT') or 4222}"
    return containers, asyncio.run(_until_seen(args))


async def _until_seen(args: argparse.Namespace) -> ServicesReply:
    """Ask until the coordinator knows a service and its server answers: only then can it be moved.

    What the log knows of services that are gone since, and will not answer any more, is left out.
    """
    last = "no service was seen"
    try:
        async with asyncio.timeout(SEEN_SECONDS):
            while True:
                try:
                    async with session.connected(args) as bus:
                        reply = await session.services(bus)
                        there = session.present(reply)
                        silent = [one.service for one in there if not await session.heralds(bus, one.service)]
                        if there and not silent:
                            return replace(reply, services=there)
                        last = f"no server of {', '.join(silent)} answers" if there else "no service was seen"
                except FerryError as error:
                    if error.code not in ("no_answer", "nats_unreachable"):
                        raise
                    last = error.message
                await asyncio.sleep(ASK_EVERY)  # nothing announces a service's first sight
    except TimeoutError:
        raise FerryError(
            "setup_failed",
            f"The containers run, but after {SEEN_SECONDS:g} s there is nothing to move: {last}",
            hint="podman-compose logs shows what the services say.",
        ) from None


def run_down(args: argparse.Namespace, out: Output) -> int:
    stopped = stack(args, out).down(volumes=args.volumes)
    if out.as_json:
        out.record({"result": {"removed": stopped, "volumes": args.volumes}})
    out.line(f"{describe.count(stopped, 'container')} removed" if stopped else "nothing was running")
    return Exit.DONE


def run_clean(args: argparse.Namespace, out: Output) -> int:
    stack(args, out).clean(images=not args.keep_images)
    if out.as_json:
        out.record({"result": {"images": not args.keep_images}})
    out.line(
        "containers, network, volumes and images removed" if not args.keep_images else "all but the images removed"
    )
    return Exit.DONE
