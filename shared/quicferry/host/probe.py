"""What CRIU says of this kernel, run inside the image by the preflight: one JSON object on standard output."""

from __future__ import annotations

import sys

import msgspec

from quicferry.host.command import attempt

FEATURES = ("mem_dirty_track", "uffd-noncoop", "timens", "clone3_set_tid", "pidfd_store", "sk_unix_file")
"""Names as of ``criu check --feature`` (criu(8))."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    """``4.2.1``; empty if criu does not start."""
    usable: bool
    """``criu check`` found nothing amiss."""
    said: str
    """What it printed, warnings too."""
    features: dict[str, bool]


def look() -> Probe:
    """Ask CRIU; some milliseconds a question. Needs root and the host's privileges."""
    told = attempt(["criu", "--version"], timeout=30).out.split()
    version = told[told.index("Version:") + 1] if "Version:" in told[:-1] else ""
    checked = attempt(["criu", "check"], timeout=60)
    features = {name: attempt(["criu", "check", "--feature", name], timeout=60).ok for name in FEATURES}
    return Probe(version=version, usable=checked.ok, said=checked.output[-2_000:], features=features)


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(look()).decode() + "\n")
