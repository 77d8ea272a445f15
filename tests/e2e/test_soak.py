"""The soak, for a moment only: that it runs, moves, breaks and reports, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from tests.e2e.berths import PROJECT
from tests.soak.record import Result

SEED = 20
MINUTES = 0.4


async def test_services_are_moved_and_broken_at_random_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.soak", "--minutes", str(MINUTES), "--seed", str(SEED), "--out", str(out)),
        *("--services", "2", "--clients", "2", "--evidence", str(tmp_path / "evidence")),
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT}/shared"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    text = said.decode(errors="replace")
    _show(tmp_path / "evidence")
    assert process.returncode == 0, text
    result = msgspec.json.decode(out.read_bytes(), type=Result)
    assert result.violations == []
    assert result.leaks == []
    assert any(move.outcome == "completed" for move in result.moves), text
    assert result.faults, text
    assert result.echoes_lost == 0
    assert result.handshakes == result.sessions


def _show(evidence: Path) -> None:
    for kept in sorted(evidence.glob("*")):
        print(f"--- {kept.name}\n{kept.read_text(encoding='utf-8')[-20_000:]}")
