"""Errors that reach a person: a stable code, a sentence, and what to do next."""

from __future__ import annotations

from typing import Final

import msgspec

CODES: Final[dict[str, str]] = {
    "bad_request": "A message is not of its form.",
    "unknown_service": "No server of that name is known.",
    "unknown_berth": "No berth of that name is known.",
    "unknown_migration": "No migration of that id is in the log.",
    "no_target": "No empty berth fits the service.",
    "berth_busy": "The target berth holds a server.",
    "berth_gone": "The berth's container is not running.",
    "same_berth": "The server is in that berth already.",
    "service_busy": "Another migration of this service is under way.",
    "id_in_use": "That id names another migration.",
    "too_late": "The migration is committed and can't be cancelled.",
    "cancelled": "The migration was cancelled on request.",
    "phase_timeout": "A phase took longer than its limit.",
    "nobody_serves": "A migration was given up while no copy of the server was known to serve.",
    "server_gone": "The server's process is not there.",
    "server_unarmed": "The server's wrapper did not answer.",
    "heap_gone": "The memory of the server can't be found any more.",
    "hold_refused": "The server did not give up its socket.",
    "image_mismatch": "The berths run different images.",
    "dirty_tracking_missing": "This kernel does not track dirty pages.",
    "criu_missing": "CRIU did not start in the berth.",
    "criu_failed": "CRIU refused a dump or a restore.",
    "port_taken": "The service's port is taken in the target berth.",
    "host_pid_namespace": "An agent does not see the host's processes.",
    "podman_unreachable": "The podman service does not answer.",
    "nats_unreachable": "NATS does not answer.",
    "nats_denied": "NATS refused the operation.",
    "no_answer": "Nobody answered a request.",
    "connect_failed": "A QUIC connection could not be made.",
    "bad_settings": "A setting can't be used as it is.",
    "not_leading": "The coordinator that was asked does not lead any more.",
    "log_conflict": "Another coordinator wrote this decision first.",
    "replay_differs": "The log holds decisions that the state machine would not take.",
    "log_unreadable": "A log is incomplete or not one of ours.",
    "file_refused": "A file can't be read or written as asked.",
    "still_running": "The command stopped waiting; the migration goes on.",
    "usage": "The command line is not of its form.",
    "internal": "A defect of quicferry.",
    "machine_unfit": "This machine lacks something quicferry needs.",
    "setup_failed": "A step of the set-up failed.",
}
"""Every code with its meaning; docs/errors.md is generated from this table."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as it travels: in a reply's ``error`` field and in failed events."""

    code: str
    message: str
    hint: str = ""
    path: str = ""
    """The offending field of the request, as ``$.field``; empty when no single field is at fault."""


class FerryError(Exception):
    """An error with a stable ``code`` of :data:`CODES`, a sentence for a person and a ``hint``."""

    def __init__(self, code: str, message: str, *, hint: str = "", path: str = "") -> None:
        if code not in CODES:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.path = path

    def __str__(self) -> str:
        where = f" (at {self.path})" if self.path else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{self.code}: {self.message}{where}{hint}"

    def body(self) -> ErrorBody:
        return ErrorBody(code=self.code, message=self.message, hint=self.hint, path=self.path)

    @classmethod
    def of(cls, body: ErrorBody) -> FerryError:
        """Rebuild an error received from another process; codes newer than ours become ``internal``."""
        code = body.code if body.code in CODES else "internal"
        return cls(code, body.message, hint=body.hint, path=body.path)
