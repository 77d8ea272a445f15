"""Replay: feed a log through the state machine and compare its decisions with those logged."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from quicferry.migration.commands import Command, Decide
from quicferry.migration.machine import State, handle, wanted
from quicferry.protocol import events as ev


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the log, the state after it and the commands the machine gives for it."""

    event: ev.AnyEvent
    state: State
    commands: list[Command]
    differs: str = ""
    """Why the machine would not have taken this decision; empty where it would, and for what is no decision."""


def replay(events: Iterable[ev.AnyEvent]) -> list[Step]:
    """Every step of one migration. Raises ValueError when the log does not begin with its request."""
    steps: list[Step] = []
    state: State | None = None
    meant: set[str] = set()
    """Decisions asked for so far."""
    for event in events:
        differs = _differs(state, event, meant) if state is not None else ""
        state, commands = handle(state, event)
        meant |= {command.decision for command in commands if isinstance(command, Decide)}
        steps.append(Step(event=event, state=state, commands=commands, differs=differs))
    return steps


def _differs(state: State, event: ev.AnyEvent, meant: set[str]) -> str:
    source, _, name = ev.kind(event).partition(".")
    if source != "decision":
        return ""
    if isinstance(event, ev.Requested):
        return "A migration is requested once."
    if isinstance(event, ev.Prepared) and not state.prepared and "prepared" in meant:
        return ""  # a timeout or a cancellation may come into the log while it is on its way; both only lead back
    decides = [command for command in wanted(state) if isinstance(command, Decide)]
    for command in decides:
        if command.decision != name:
            continue
        if isinstance(event, ev.RolledBack | ev.Failed) and event.reason != command.reason:
            return f"The reason logged is {event.reason.code}, the machine's is {command.reason}."
        if isinstance(event, ev.Completed) and event.arrived != command.arrived:
            return f"{event.arrived} clients logged as arrived, {command.arrived} seen."
        return ""
    wants = ", ".join(command.decision for command in decides) or "no decision"
    return f"The log says {name}; in phase {state.phase.value} the machine wants {wants}."
