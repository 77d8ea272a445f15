"""The ``quicferry`` command: its parser, and what becomes of every error."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import structlog

from quicferry.cli import exits
from quicferry.cli.exits import Exit, ExitError
from quicferry.cli.output import Output
from quicferry.protocol.errors import FerryError

MODULES: Final = ("lifecycle", "doctor", "migrate", "query", "history", "client", "demo", "bench")
"""Each has ``add_parsers(commands, parents)``; a parser's default ``run(args, output)`` returns the exit code."""

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

ENVIRONMENT: Final[dict[str, str]] = {
    "NATS_URL": "the NATS server; others as for the nats command",
    "QUICFERRY_PROJECT": "the directory with compose.yaml",
    "QUICFERRY_LOG": "logs as text or json",
    "NO_COLOR": "no colours",
    "SRC_PORT, DST_PORT, NATS_PORT": "up: the ports on the host",
    "COMPOSE_PROJECT_NAME": "tells copies of the system apart",
    "TARGET_ADDR, TRANSPARENT": "client: the first address; stay connected",
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported, and takes no shortened flags."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **keywords})

    def error(self, message: str) -> NoReturn:
        raise ExitError(Exit.USAGE, "usage", f"{message[:1].upper()}{message[1:]}.", hint=f"`{self.prog} --help`")


class Version(argparse.Action):
    """Prints the version; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            version = importlib.metadata.version("quicferry")
        except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
            version = "0 (not installed)"
        sys.stdout.write(f"quicferry {version}\n")
        parser.exit(0)


def build_parser() -> Parser:
    """The whole command line."""
    variables = [f"  {name:<30}{meaning}" for name, meaning in ENVIRONMENT.items()]
    parser = Parser(
        prog="quicferry",
        parents=[_common()],
        description="Moves running QUIC servers between containers; their clients stay connected.",
        epilog="\n".join([exits.epilog(), "", "environment:", *variables]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    parser.set_defaults(json=False, nats=None, context=None, project=None, verbose=0)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name in MODULES:
        if importlib.util.find_spec(f"quicferry.cli.{name}"):
            # Flags of their own: argparse shares a parent's, and what one parser changes would change in all.
            importlib.import_module(f"quicferry.cli.{name}").add_parsers(commands, [_common()])
    return parser


def _common() -> argparse.ArgumentParser:
    """Flags that may stand before or after the command's name."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="JSON, one object a line")
    group.add_argument("--nats", metavar="URL", help="the NATS server")
    group.add_argument("--context", metavar="NAME", help="a context of the nats command line")
    group.add_argument("--project", metavar="DIR", help="the directory with compose.yaml")
    group.add_argument("-v", "--verbose", action="count", help="log what happens; -vv: all of it")
    return common


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    _open_outputs()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Also for what goes wrong before the arguments are understood.
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    out = Output(as_json=as_json)
    verbose = 0
    try:
        args = build_parser().parse_args(given)
        verbose = args.verbose
        out.as_json = args.json is True  # demo's names a file
        _log(verbose)
        code = int(args.run(args, out))
        sys.stdout.flush()
    except FerryError as error:
        out.error(error)
        return error.exit_code if isinstance(error, ExitError) else Exit.ERROR
    except KeyboardInterrupt:
        out.note("interrupted")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return Exit.BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the last one there is: a defect is reported like an error
        if verbose:
            structlog.get_logger().exception("command_failed")
        out.error(_unforeseen(error))
        return Exit.ERROR
    return code


def _unforeseen(error: Exception) -> FerryError:
    """A full disk or a file that may not be used can meet any command; everything else is a defect."""
    if isinstance(error, OSError) and error.filename is not None:
        return FerryError(
            "file_refused",
            f"{os.fsdecode(error.filename)} can't be used: {error.strerror}.",
            hint="Is it there, and may you use it? -v shows what wanted it.",
        )
    if isinstance(error, OSError) and error.errno in FULL:
        _drop_output()
        return FerryError(
            "file_refused",
            f"The output can't be written: {error.strerror}.",
            hint="Make room where standard output goes, or send it elsewhere.",
        )
    what = f"A defect of quicferry: {type(error).__name__}: {error}."
    return FerryError("internal", what, hint="-v shows where. Please report it.")


def _drop_output() -> None:
    """Python flushes standard output once more at its end, and would complain."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_outputs() -> None:
    """Whoever closes an output does not want to see it; Python has None in its place."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as we run
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _log(verbose: int) -> None:
    from quicferry.logging import configure

    configure("cli")
    if "QUICFERRY_LOG_LEVEL" not in os.environ or verbose:
        level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
        logging.getLogger().setLevel(max(level, logging.INFO) if verbose else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
