"""Ends every copy of the system on this machine, whatever its name: ``python -m quicferry.host.sweep``.

For CI and for a developer whose test run was killed. Images and everything without our label stay.
"""

from __future__ import annotations

import sys

import msgspec

from quicferry.host import inventory, podman_service
from quicferry.host.command import attempt, run
from quicferry.protocol.errors import FerryError


def sweep() -> list[str]:
    """Remove all our containers, networks and volumes; returns what was removed. Needs root."""
    if not attempt(["podman", "--version"], timeout=30).ok:
        return []
    removed = []
    if there := inventory.containers(None, {}):
        run(
            ["podman", "rm", "--force", "--time", "2", *(container.id for container in there)],
            timeout=30 + 5 * len(there),
            doing="removing containers",
        )
        removed += [container.name for container in there]
    for kind in ("network", "volume"):
        if names := inventory.named(kind, None, {}):
            run(["podman", kind, "rm", *names], timeout=60, doing=f"removing {kind}s")
            removed += names
    podman_service.stop_all_own()
    return removed


def main() -> int:
    try:
        removed = sweep()
    except (FerryError, msgspec.DecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    if removed:
        print("quicferry: removed", *removed, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
