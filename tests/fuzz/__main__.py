"""``python -m tests.fuzz TARGET SECONDS``: one target under atheris; a finding is written to crash-* and ends it."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quicferry", "msgspec"]):
    from tests.fuzz.targets import SEEDS, TARGETS


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    corpus = Path(tempfile.mkdtemp(prefix="quicferry-fuzz-"))
    atexit.register(shutil.rmtree, corpus, ignore_errors=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    arguments = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={seconds}",
        "-max_len=200000",
        "-rss_limit_mb=1024",
        "-timeout=5",
    ]
    atheris.Setup(arguments, TARGETS[name])
    atheris.Fuzz()


main()
