"""Ends what was started from this checkout and is still there: ``python -m quicferry.host.sweep [PROJECT_DIR]``.

For CI, and for a developer whose test run was killed. Other checkouts' copies of the system, images and
everything without our label stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

from quicferry.host.compose import Stack, remembered
from quicferry.protocol.errors import FerryError


def sweep(project: Path) -> list[str]:
    """Remove every copy that :meth:`Stack.up` started from here, volumes too; returns their names. Needs root."""
    names = remembered(project)
    for name in names:
        Stack(project, name=name).down(volumes=True)
    return names


def main() -> int:
    try:
        names = sweep(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    except FerryError as error:
        print(error, file=sys.stderr)
        return 1
    if names:
        print("quicferry: ended", *names, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
