"""The demo's client: whatever it says and however it ends, the demo has its account."""

from __future__ import annotations

import json
import os
import sys

from quicferry.cli.demo import _Client


def saying(what: object) -> list[str]:
    return [sys.executable, "-c", f"print({json.dumps(what)!r})"]


async def test_a_summary_of_a_thousand_moves_is_heard() -> None:
    moves = [{"id": f"m{number}", "target": "x" * 150} for number in range(1000)]
    async with _Client.started(saying({"event": "summary", "moves": moves}), os.environ) as client:
        assert (await client.heard("summary"))["moves"] == moves


async def test_a_client_that_has_ended_by_itself_is_no_defect() -> None:
    async with _Client.started(saying({"event": "summary", "moves": []}), os.environ) as client:
        await client.heard("over")
        await client._process.wait()
        assert (await client.stop())["moves"] == []
