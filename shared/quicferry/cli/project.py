"""Where the project is: the directory with compose.yaml, containers/ and services/."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import quicferry
from quicferry.protocol.errors import FerryError


def directory(args: argparse.Namespace) -> Path:
    """--project; else the current directory, $QUICFERRY_PROJECT, or the checkout this package runs from.

    Raises FerryError ``bad_settings`` when none of them holds the project.
    """
    if args.project:
        return _checked(Path(args.project), "--project")
    if _is_ours(Path()):  # not Path.cwd(): a current directory that was removed has no name
        return Path.cwd()
    if from_environment := os.environ.get("QUICFERRY_PROJECT"):
        return _checked(Path(from_environment), "QUICFERRY_PROJECT")
    checkout = Path(quicferry.__file__).resolve().parents[2]
    if _is_ours(checkout):
        return checkout
    raise FerryError(
        "bad_settings",
        "There is no quicferry project here: no compose.yaml of ours.",
        hint="Run it in the project's directory, or name that with --project or QUICFERRY_PROJECT.",
    )


def _checked(path: Path, origin: str) -> Path:
    path = Path(os.path.realpath(os.path.expanduser(path)))  # pathlib's own raise where there is no such user
    if not _is_ours(path):
        raise FerryError(
            "bad_settings",
            f"{path}, from {origin}, is no quicferry project: it has no compose.yaml of ours.",
            hint="It is the directory with compose.yaml, containers/ and services/.",
        )
    return path


def _is_ours(path: Path) -> bool:
    # The current directory may well have somebody else's compose.yaml.
    try:
        return "io.quicferry" in (path / "compose.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
