"""Running other programs: argument lists, a time limit always, the output kept for the error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from quicferry.protocol.errors import FerryError

KEPT_CHARACTERS = 2_000
"""Of a failed program's output, the end: that is where the reason stands."""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def output(self) -> str:
        """Both streams, for a person."""
        return "\n".join(text.strip() for text in (self.out, self.err) if text.strip())


def attempt(
    arguments: Sequence[str | Path],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
) -> Result:
    """Run a program to its end; ``timeout`` in seconds, then it is killed and the code is 124.

    A program that is not there gives 127, as a shell would. ``env`` is added to this process's own.
    """
    command = [str(argument) for argument in arguments]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError:
        return Result(127, "", f"{command[0]}: not found")
    except PermissionError as error:
        return Result(126, "", f"{command[0]}: {error.strerror}")
    except subprocess.TimeoutExpired as error:
        return Result(124, _text(error.stdout), f"{_text(error.stderr)}\nno end within {timeout:g} s")
    return Result(done.returncode, done.stdout, done.stderr)


def run(
    arguments: Sequence[str | Path],
    *,
    timeout: float,
    doing: str,
    hint: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """:func:`attempt`, and its standard output; raises FerryError ``setup_failed`` if it did not succeed.

    ``doing`` completes the sentence "… failed", for example "building the image".
    """
    result = attempt(arguments, timeout=timeout, env=env, cwd=cwd)
    if not result.ok:
        said = result.output[-KEPT_CHARACTERS:] or "it printed nothing"
        program = Path(str(arguments[0])).name
        raise FerryError(
            "setup_failed",
            f"{doing[:1].upper()}{doing[1:]} failed ({program} ended with {result.code}): {said}",
            hint=hint,
        )
    return result.out


def _text(output: bytes | str | None) -> str:
    # TimeoutExpired carries bytes even in text mode.
    if output is None:
        return ""
    return output.decode(errors="replace") if isinstance(output, bytes) else output
