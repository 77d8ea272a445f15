"""Every named point of a move, and the faults that make sense there."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

Way = Literal["forward", "back", "back early"]
"""``back``: the migration fails at :data:`FAILS_AT` first, with the source held; ``early``: before it is told."""
Table = dict["Who", tuple[tuple[str, tuple[str, ...]], ...]]
"""For each process its points, in order, with their faults."""
Who = Literal["coordinator", "checkpoint_agent", "restore_agent", "server", "target", "client"]
"""``server`` is the copy at the source, ``target`` the restored one."""

FAILS_AT: Final[dict[Way, str]] = {"back": "target.restoring", "back early": "source.dump_asked"}

CALLS: Final = ("kill", "stop", "twice")
ENDS: Final = ("kill", "stop")
STEPS: Final = ("kill", "exit", "stop", "hang", "error")
SAYS: Final = ("kill", "stop", "lost")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One fault at one point."""

    point: str
    fault: str
    who: Who
    way: Way = "forward"
    """Whether the point lies on the way forward, or on the way back: then the migration is made to fail first."""

    @property
    def shown(self) -> str:
        return f"{self.point} ({self.way})" if self.way != "forward" else self.point


def _points() -> list[tuple[Who, Way, str, tuple[str, ...]]]:
    forward: Table = {
        "coordinator": (
            ("asked.quicferry.migrate", (*ENDS, "error")),
            ("coordinator.locked", ENDS),
            ("coordinator.requested", ENDS),
            ("answer.quicferry.migrate", (*ENDS, "lost")),
            ("coordinator.checkpoint.prepare", CALLS),
            ("coordinator.restore.prepare", CALLS),
            ("coordinator.write.decision.prepared", ENDS),
            ("coordinator.decided.prepared", ENDS),
            ("coordinator.server.arm", CALLS),
            ("coordinator.write.coordinator.armed", ENDS),
            ("coordinator.checkpoint.dump", CALLS),
            ("coordinator.restore.restore", CALLS),
            ("coordinator.write.decision.committed", ENDS),
            ("coordinator.decided.committed", ENDS),
            ("coordinator.restore.resume", CALLS),
            ("coordinator.checkpoint.release", CALLS),
            ("coordinator.write.place", ENDS),
            ("coordinator.write.decision.completed", ENDS),
            ("coordinator.decided.completed", ENDS),
            ("coordinator.write.unlock", ENDS),
        ),
        "checkpoint_agent": (
            *_step("checkpoint", "prepare", "prepared"),
            *_step("checkpoint", "dump", "held", "dumped"),
            *_step("checkpoint", "release", "released"),
            ("source.dump_asked", STEPS),
            ("source.told", STEPS),
            ("source.parked", ENDS),
            ("source.frozen", STEPS),
        ),
        "restore_agent": (
            *_step("restore", "prepare", "prepared"),
            *_step("restore", "restore", "restored"),
            *_step("restore", "resume", "resumed"),
            ("target.bound", STEPS),
            ("target.restoring", STEPS),
            ("target.restored", STEPS),
            ("target.standing_by", STEPS),
            ("target.resuming", STEPS),
            ("target.adopted", STEPS),
        ),
        "server": (
            ("asked.quicferry.server.echo.arm", (*ENDS, "error")),
            ("answer.quicferry.server.echo.arm", (*ENDS, "error", "lost")),
            ("server.told", (*ENDS, "error")),
            ("server.quiesced", (*ENDS, "error")),
            ("server.holding", (*ENDS, "error")),
        ),
        "target": (("server.adopted", ENDS),),
        "client": (("client.told", ENDS), ("client.acked", ENDS), ("client.heard", ENDS)),
    }
    back: Table = {
        "coordinator": (
            ("coordinator.checkpoint.abort", CALLS),
            ("coordinator.restore.abort", CALLS),
            ("coordinator.write.decision.rolled_back", ENDS),
            ("coordinator.decided.rolled_back", ENDS),
        ),
        "checkpoint_agent": (
            *_step("checkpoint", "abort", "aborted"),
            ("source.thawed", STEPS),
            ("source.giving_back", STEPS),
        ),
        "restore_agent": (("say.restore.failed", SAYS), *_step("restore", "abort", "aborted")),
        "server": (("server.adopted", ENDS),),
    }
    early: Table = {
        "coordinator": (
            ("coordinator.server.disarm", CALLS),
            ("coordinator.write.coordinator.disarmed", ENDS),
            ("coordinator.checkpoint.abort", ("kill",)),
        ),
        "checkpoint_agent": (("say.checkpoint.failed", SAYS), ("source.thawed", STEPS)),
    }
    ways: tuple[tuple[Way, Table], ...] = (
        ("forward", forward),
        ("back", back),
        ("back early", early),
    )
    return [
        (who, way, point, kinds) for way, table in ways for who, points in table.items() for point, kinds in points
    ]


def _step(role: str, verb: str, *said: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """An agent's step from the request to the events that it says."""
    subject = f"quicferry.node.local.{role}.{verb}"
    return (
        (f"asked.{subject}", (*ENDS, "error")),
        (f"answer.{subject}", ("kill", "lost", "error")),
        (f"{role}.{verb}", STEPS),
        *((f"say.{role}.{event}", SAYS) for event in said),
    )


FROM_OUTSIDE: Final[dict[str, tuple[tuple[Who, str], ...]]] = {
    "nats away": (
        ("coordinator", "coordinator.locked"),
        ("coordinator", "coordinator.write.decision.prepared"),
        ("coordinator", "coordinator.write.coordinator.armed"),
        ("checkpoint_agent", "source.told"),
        ("server", "server.told"),
        ("checkpoint_agent", "source.frozen"),
        ("restore_agent", "target.restored"),
        ("coordinator", "coordinator.write.decision.committed"),
        ("coordinator", "coordinator.decided.committed"),
        ("restore_agent", "target.adopted"),
        ("coordinator", "coordinator.write.place"),
        ("coordinator", "coordinator.write.decision.completed"),
        ("coordinator", "coordinator.write.unlock"),
    ),
    "cancelled": (
        ("checkpoint_agent", "checkpoint.prepare"),
        ("restore_agent", "target.bound"),
        ("server", "answer.quicferry.server.echo.arm"),
        ("checkpoint_agent", "checkpoint.dump"),
        ("checkpoint_agent", "source.dump_asked"),
        ("checkpoint_agent", "source.told"),
        ("server", "server.told"),
        ("server", "server.quiesced"),
        ("server", "server.holding"),
        ("checkpoint_agent", "source.parked"),
        ("checkpoint_agent", "source.frozen"),
        ("checkpoint_agent", "say.checkpoint.dumped"),
        ("restore_agent", "target.restoring"),
        ("restore_agent", "target.restored"),
        ("restore_agent", "say.restore.restored"),
        ("restore_agent", "target.standing_by"),
        ("restore_agent", "target.resuming"),
        ("restore_agent", "target.adopted"),
    ),
    "source berth removed": (
        ("coordinator", "coordinator.decided.prepared"),
        ("checkpoint_agent", "source.told"),
        ("checkpoint_agent", "source.parked"),
        ("checkpoint_agent", "source.frozen"),
        ("restore_agent", "target.restored"),
        ("coordinator", "coordinator.decided.committed"),
        ("restore_agent", "target.adopted"),
    ),
    "target berth removed": (
        ("coordinator", "coordinator.decided.prepared"),
        ("checkpoint_agent", "source.told"),
        ("checkpoint_agent", "source.frozen"),
        ("restore_agent", "target.restoring"),
        ("restore_agent", "target.restored"),
        ("coordinator", "coordinator.decided.committed"),
        ("restore_agent", "target.resuming"),
        ("restore_agent", "target.adopted"),
    ),
    "server killed for memory": (
        ("checkpoint_agent", "checkpoint.prepare"),
        ("coordinator", "coordinator.decided.prepared"),
        ("checkpoint_agent", "source.told"),
        ("checkpoint_agent", "source.parked"),
        ("checkpoint_agent", "source.frozen"),
        ("coordinator", "coordinator.decided.committed"),
    ),
    "target killed for memory": (
        ("restore_agent", "target.restored"),
        ("restore_agent", "target.standing_by"),
        ("restore_agent", "target.resuming"),
        ("restore_agent", "target.adopted"),
    ),
    "disk full": (
        ("checkpoint_agent", "checkpoint.prepare"),
        ("checkpoint_agent", "checkpoint.dump"),
        ("checkpoint_agent", "source.parked"),
        ("restore_agent", "target.restoring"),
    ),
}
"""At these points the process stands still while it happens."""


def cases() -> list[Case]:
    """All of the matrix, in the order of a move."""
    planted = [
        Case(point=point, fault=fault, who=who, way=way) for who, way, point, kinds in _points() for fault in kinds
    ]
    outside = [
        Case(point=point, fault=fault, who=who) for fault, places in FROM_OUTSIDE.items() for who, point in places
    ]
    return planted + outside


def points() -> set[str]:
    """Every point that the matrix knows."""
    return {point for _, _, point, _ in _points()}
