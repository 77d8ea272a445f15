"""``quicferry client``: the car client, in the foreground, against where the service is now."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quicferry.cli import arguments, describe, lifecycle, project, session
from quicferry.cli.output import Output
from quicferry.protocol.api import Placement
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from quicferry.host.compose import Stack

TARGET = "TARGET_ADDR"
CA = "QUICFERRY_CA"


def add_parsers(commands: arguments.Commands, parents: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "client",
        parents=parents,
        help="a client that pings the service and reports each pause",
        description="Runs the car client against where the service is now, until Ctrl-C. What follows -- goes to it: "
        "`quicferry client -- --help` lists it. TARGET_ADDR and TRANSPARENT are honoured.",
    )
    parser.add_argument("--service", type=arguments.name, help="default: the only one")
    parser.add_argument("--cafile", metavar="FILE", help="the server's CA; default: from the certificates' volume")
    parser.add_argument("passed", metavar="-- ARGUMENT", nargs="*", help="arguments of the car client")
    parser.set_defaults(run=run_client)


def run_client(args: argparse.Namespace, out: Output) -> int:
    """Becomes the car client; returns only by an error."""
    directory = project.directory(args)
    if not (directory / "services" / "car_client").is_dir():
        raise FerryError(
            "bad_settings", f"{directory} has no services/car_client.", hint="Name a whole checkout with --project."
        )
    if {"-h", "--help"} & set(args.passed):
        os.execve(*_exec(args, directory, "", ""))  # noqa: S606 - an argument list, and no shell
    target = os.environ.get(TARGET) or describe.address(asyncio.run(_placement(args)).place.address)
    cafile = args.cafile or os.environ.get(CA) or find_cafile(lifecycle.stack(args, out))
    out.note(f"pinging {target}")
    os.execve(*_exec(args, directory, target, cafile))  # noqa: S606 - an argument list, and no shell


def _exec(
    args: argparse.Namespace, directory: Path, target: str, cafile: str
) -> tuple[str, list[str], dict[str, str]]:
    sys.stdout.flush()
    command, environment = command_line(args, directory, target, cafile, os.environ)
    return command[0], command, environment


async def _placement(args: argparse.Namespace) -> Placement:
    async with session.connected(args) as bus:
        return await session.the_service(bus, args.service)


def command_line(
    args: argparse.Namespace, directory: Path, target: str, cafile: str, base: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The client's argument list and environment."""
    command = [sys.executable, "-m", "services.car_client", "--cafile", cafile]
    if args.json:
        command.append("--json")
    path = [str(directory), *filter(None, [base.get("PYTHONPATH")])]
    stay = base.get("TRANSPARENT") or "1"
    return [*command, *args.passed], {
        **base,
        "TRANSPARENT": stay,
        TARGET: target,
        "PYTHONPATH": os.pathsep.join(path),
    }


def find_cafile(stack: Stack) -> str:
    """The certificate that the server made for itself, in the volume that the berths share.

    Raises FerryError ``setup_failed`` or ``file_refused``.
    """
    from quicferry.host.command import run

    mountpoint = run(
        ["podman", "volume", "inspect", "--format", "{{.Mountpoint}}", f"{stack.name}_tls"],
        timeout=30,
        doing="looking for the certificates' volume",
        hint="`quicferry up` makes it; --cafile names a certificate of your own.",
        env=stack.environment,
    ).strip()
    cafile = Path(mountpoint) / "cert.pem"
    if not os.path.isfile(cafile):  # pathlib's raises where somebody may not look, on Python 3.11
        raise FerryError(
            "file_refused",
            f"There is no certificate {cafile}.",
            hint="The server makes it at its first start; reading it needs root. --cafile names another.",
        )
    return str(cafile)
