"""How often an abort or a resume is asked for, how long apart, and what a person is told when it was in vain.

While a copy serves there are only leftovers to clear away, and that may be given up soon. While none does, whoever
can bring it back is waited for: a host that reboots, an agent that is down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from quicferry.protocol.errors import ErrorBody

if TYPE_CHECKING:
    from quicferry.migration.machine import State  # which asks us

RETRY_SECONDS: Final = 5.0
"""Until an abort is asked for again, and what the wait grows by while no copy serves."""
LONGEST_RETRY_SECONDS: Final = 60.0
UNSERVED_ATTEMPTS: Final = 66
"""While no copy serves; with these waits, about an hour."""
ABORT_ATTEMPTS: Final = 5
"""Once one serves, of an abort."""
RESUME_ATTEMPTS: Final = 10
"""Once one serves, of what is left to do after a resume."""


def served(state: State) -> bool:
    """Whether a copy is known to serve. A server that was armed may stand still with nobody there to say so."""
    return state.resumed if state.committed else state.source_back or not state.armed


def last_attempt(state: State) -> int:
    """The attempt after which the present phase, ``aborting`` or ``resuming``, is given up."""
    if not served(state):
        return UNSERVED_ATTEMPTS
    return state.served_since + (RESUME_ATTEMPTS if state.committed else ABORT_ATTEMPTS)


def growing(number: int) -> float:
    """Seconds to wait after attempt ``number``."""
    return min(number * RETRY_SECONDS, LONGEST_RETRY_SECONDS)


def given_up(state: State) -> ErrorBody:
    """Where things stand after the last attempt, and what a person can do."""
    request = state.request
    source, target = (f"{place.node}/{place.berth}" for place in (request.source, request.target))
    if not served(state):
        if state.committed:
            where = f"did not begin to serve in berth {target}"
            where += "" if state.released else f", and stands still in berth {source}"
        else:
            where = f"{'stands' if state.held else 'may stand'} still in berth {source}: it was not brought back"
        why = f" It went back for this: {state.reason.message}" if state.reason is not None else ""
        return ErrorBody(
            code="nobody_serves",
            message=f"The server of {request.service!r} {where} in {state.attempt} attempts.{why}",
            hint="Its sessions are lost: restart both berths, and see that one of them has a new server.",
        )
    if state.reason is not None:
        return state.reason
    return ErrorBody(
        code="phase_timeout",
        message=f"The server serves in berth {target}, but what stands still in berth {source} was not ended.",
        hint=f"Restart the berth {source}.",
    )
