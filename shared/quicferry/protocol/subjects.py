"""NATS subjects, version 1: the only place that spells them."""

from __future__ import annotations

from typing import Final

PREFIX: Final = "quicferry"

MIGRATE: Final = "quicferry.migrate"
CANCEL: Final = "quicferry.cancel"
STATUS: Final = "quicferry.status"
SERVICES: Final = "quicferry.services"

LOG_STREAM: Final = "quicferry_log"
LOG_ALL: Final = "quicferry.log.>"
PLACEMENT_BUCKET: Final = "quicferry_placement"
BERTH_BUCKET: Final = "quicferry_berths"
LOCK_BUCKET: Final = "quicferry_locks"
LEAD_BUCKET: Final = "quicferry_lead"
LEAD_KEY: Final = "coordinator"

CHECKPOINT_VERBS: Final = ("prepare", "pre_dump", "dump", "release", "abort")
RESTORE_VERBS: Final = ("prepare", "restore", "resume", "abort")


def checkpoint(node: str, verb: str) -> str:
    """What the checkpoint agent of ``node`` answers."""
    return f"quicferry.node.{node}.checkpoint.{verb}"


def restore(node: str, verb: str) -> str:
    """What the restore agent of ``node`` answers."""
    return f"quicferry.node.{node}.restore.{verb}"


def arm(service: str) -> str:
    """What the server wrapper of ``service`` answers."""
    return f"quicferry.server.{service}.arm"


def decision(migration: str) -> str:
    """The decisions of one migration, written by a coordinator only."""
    return f"quicferry.log.{migration}.decision"


def seen(migration: str, source: str, event: str) -> str:
    """What ``source`` saw in one migration."""
    return f"quicferry.log.{migration}.{source}.{event}"


def log_of(migration: str) -> str:
    """Everything in the log about one migration."""
    return f"quicferry.log.{migration}.>"


def berth_key(node: str, berth: str) -> str:
    """A berth's key in its bucket."""
    return f"{node}.{berth}"
