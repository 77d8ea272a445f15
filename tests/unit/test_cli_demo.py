"""The demo's client: whatever it says and however it ends, the demo has its account."""

from __future__ import annotations

import os
import sys

from quicferry.cli.demo import _Client

SUMMARY = """
import json
moves = [{"id": f"m{number}", "target": "x" * 150} for number in range(1000)]
print(json.dumps({"event": "summary", "moves": moves}))
"""


async def test_a_client_of_many_moves_that_has_ended_by_itself_has_its_summary_heard() -> None:
    async with _Client.started([sys.executable, "-c", SUMMARY], os.environ) as client:
        assert [move["id"] for move in (await client.heard("summary"))["moves"]] == [f"m{n}" for n in range(1000)]
        await client.heard("over")
        await client._process.wait()
        assert len((await client.stop())["moves"]) == 1000
