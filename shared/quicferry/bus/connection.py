"""One NATS connection: connecting, waiting, asking, and errors that say what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NoReturn, TypeVar

import msgspec
import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.micro.request import ERROR_CODE_HEADER

from quicferry.bus.refusals import Watch, denied, error_of, no_nkeys, unusable
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import wire
from quicferry.protocol.errors import FerryError

log = structlog.get_logger()

R = TypeVar("R")

FAIL_FAST: Final = 1.8
"""Seconds an impatient connect may take."""
FAIL_FAST_ERRORS: Final = 3
WAITING_LOG_EVERY: Final = 5.0
"""Seconds between two ``nats_waiting`` lines."""
CLOSE_SECONDS: Final = 0.5
_DENIED = re.compile(r"permissions violation for (?P<verb>publish|subscription)[^\"]*\"(?P<subject>[^\"]*)\"")


class _Client(Client):
    async def _close(self, status: int, do_cbs: bool = True) -> None:
        # What is left now nobody waits for. nats-py would write it once more, and on a connection that is lost that
        # fails (asyncio's writelines() is a TypeError in Python 3.12 and 3.13): then nats-py would stay half closed,
        # and tell nobody.
        self._pending, self._pending_data_size = [], 0
        await super()._close(status, do_cbs)


class Bus:
    """Owns one connection. Made by :meth:`connect` only.

    ``closed`` is set when the connection has ended for good (the server threw us out, or an impatient
    connection lost it for too long); a service then ends, and whoever supervises it starts it again.
    """

    def __init__(self, name: str, settings: NatsSettings, *, wait: bool) -> None:
        self.name = name
        self.settings = settings
        self.patience = 30.0 if wait else 2.0
        """Seconds to wait for JetStream to come up behind a connection."""
        self.nats: Client = _Client()
        self.js: JetStreamContext
        self.closed = asyncio.Event()
        self.on_reconnect: set[Callable[[], None]] = set()
        """Called after a reconnect, when what the server kept in memory for us may be gone, and when closed."""
        self._wait = wait
        self._up = False
        self._settled = asyncio.Event()
        """Set while connected, and for good once closed."""
        self._said_waiting = -WAITING_LOG_EVERY
        self._failures = 0
        self._refused = False
        self._last_failure: Exception | None = None
        self._gave_up = asyncio.Event()
        self._watches: dict[str, set[Watch]] = {}
        self._denied_subscriptions: set[str] = set()
        self._log = log.bind(nats=settings.shown)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, name: str, settings: NatsSettings, *, wait: bool) -> AsyncIterator[Bus]:
        """Connect as ``name`` and close in the end.

        With ``wait``, retry for ever, log ``nats_waiting`` and outlive every restart of the server. Without, raise
        FerryError ``nats_unreachable`` or ``nats_denied`` within 2 s.
        """
        bus = cls(name, settings, wait=wait)
        try:
            await bus._open()
            yield bus
        finally:
            await bus._close()

    async def _open(self) -> None:
        try:
            options = self.settings.connect_options()
            opening = asyncio.create_task(self._connect(options))
        except ImportError as error:
            raise no_nkeys() from error
        try:
            if self._wait:
                await opening
            else:
                await self._impatiently(opening)
        except ImportError as error:
            raise no_nkeys() from error
        except (nats.errors.Error, OSError, ValueError) as error:
            raise self._unreachable(error) from error
        except FerryError:
            raise
        except Exception as error:  # nats-py and nkeys have errors of any type for a credentials file that is none
            if not (self.settings.creds or self.settings.nkey):
                raise
            raise unusable(self.settings.origin, error) from error
        finally:
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # its error was raised above
                await opening
        self._up, self._refused = True, False
        self._settled.set()
        self.js = self.nats.jetstream(**self.settings.jetstream_options())
        self._log.debug("nats_connected", name=self.name)

    async def _connect(self, options: dict[str, Any]) -> None:
        await self.nats.connect(
            name=self.name,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnect,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            connect_timeout=2,
            reconnect_time_wait=0.25,  # type: ignore[arg-type]  # a float works; the stub says int
            max_reconnect_attempts=-1 if self._wait else 60,
            ping_interval=5,
            max_outstanding_pings=2,
            drain_timeout=1,
            **options,
        )

    async def _impatiently(self, opening: asyncio.Task[None]) -> None:
        enough = asyncio.create_task(self._gave_up.wait())
        try:
            await asyncio.wait({opening, enough}, timeout=FAIL_FAST, return_when=asyncio.FIRST_COMPLETED)
        finally:
            enough.cancel()
        if not opening.done():
            raise self._unreachable(self._last_failure)
        await opening

    def _unreachable(self, error: Exception | None) -> FerryError:
        why = str(error).removeprefix("nats: ") if error else "no answer"
        if isinstance(error, nats.errors.AuthorizationError) or "authorization violation" in why.lower():
            return FerryError(
                "nats_denied",
                f"NATS at {self.settings.shown} refused the login.",
                hint=f"The settings came from {self.settings.origin}; check user, password, token or credentials.",
            )
        return FerryError(
            "nats_unreachable",
            f"NATS at {self.settings.shown} does not answer: {why}.",
            hint=f"The address came from {self.settings.origin}; is the server running, and is the address right?",
        )

    async def _close(self) -> None:
        # The server may be gone: closing is a courtesy and must not take long.
        try:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    if self.nats.is_connected:
                        await self.sync()
        finally:
            # The assertion is nats-py's where connecting never began, and would hide why: credentials of no use.
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError, AssertionError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self.nats.close()

    # What nats-py tells us.

    async def _on_error(self, error: Exception) -> None:
        if match := _DENIED.search(str(error).lower()):
            self._deny(match["verb"], match["subject"])
            return
        if self._up and not self.nats.is_reconnecting:
            self._log.warning("nats_error", error=str(error))
            return
        self._failures += 1
        refused = "authorization" in str(error).lower()  # nats-py has a class for it, and seldom uses it
        if refused or not self._refused:
            self._last_failure = error  # what comes after a refusal are its consequences
        self._refused = self._refused or refused
        if self._failures >= FAIL_FAST_ERRORS or refused:
            self._gave_up.set()
        now = asyncio.get_running_loop().time()
        if self._wait and now - self._said_waiting >= WAITING_LOG_EVERY:
            self._said_waiting = now
            self._log.warning("nats_waiting", error=str(error).removeprefix("nats: "))

    async def _on_disconnect(self) -> None:
        if self._up and not self.nats.is_closed:
            self._settled.clear()
            self._log.warning("nats_disconnected")
            for watch in [w for ws in self._watches.values() for w in ws]:
                watch.end(lost=True)  # its answer will not come any more

    async def _on_reconnected(self) -> None:
        self._log.info("nats_reconnected")
        self._settled.set()
        self._call_readers()

    async def _on_closed(self) -> None:
        self.closed.set()
        self._settled.set()
        self._call_readers()

    def _call_readers(self) -> None:
        for call in tuple(self.on_reconnect):
            call()

    def _deny(self, verb: str, subject: str) -> None:
        """nats-py gives the subject in lower case, so that is how they are compared."""
        inbox = (self.settings.inbox_prefix or "_INBOX").lower()
        if verb == "subscription":
            self._denied_subscriptions.add(subject)
        answers_denied = verb == "subscription" and subject.startswith(inbox)
        watches = (
            [w for ws in self._watches.values() for w in ws] if answers_denied else self._watches.get(subject, ())
        )
        if not watches:
            self._log.error("nats_denied", verb=verb, subject=subject)
        for watch in tuple(watches):
            watch.end(denied=f"{verb} on {subject!r}")

    # What the rest of the package and its users do.

    def subscription_denied(self, subject: str) -> bool:
        """Whether the server refused a subscription to ``subject``; certain only after :meth:`sync`."""
        return subject.lower() in self._denied_subscriptions

    async def sync(self) -> None:
        """Return when the server has taken all that was sent before: subscriptions count, refusals are known."""
        # nats-py writes the ping of a flush past what is still buffered; the second one comes behind it.
        await self.nats.flush(timeout=3)
        await self.nats.flush(timeout=3)

    async def ready(self) -> None:
        """Wait until connected. Raises FerryError ``nats_unreachable`` if that will not be any more."""
        await self._settled.wait()
        if self.closed.is_set():
            raise self._unreachable(self.nats.last_error)

    async def ended(self) -> NoReturn:
        """Wait until the connection has ended for good. Raises FerryError ``nats_denied`` or ``nats_unreachable``."""
        await self.closed.wait()
        error = self.nats.last_error
        why = str(error).removeprefix("nats: ") if error else "no reason was given"
        raise FerryError(
            "nats_denied" if isinstance(error, nats.errors.AuthorizationError) else "nats_unreachable",
            f"NATS at {self.settings.shown} ended the connection for good: {why}.",
            hint=f"A restart connects anew. The settings came from {self.settings.origin}: do its user, password, "
            "token or credentials still hold?",
        )

    @contextlib.asynccontextmanager
    async def within(self, seconds: float, subject: str, what: str) -> AsyncIterator[None]:
        """Bound one exchange on ``subject``, and turn nats-py's errors into ours.

        Raises FerryError ``nats_denied`` as soon as the server says so (nats-py itself only times out),
        ``no_answer`` when nobody listens or the time is over, ``nats_unreachable`` when the connection is gone.
        JetStream's own refusals pass through.
        """
        watch = Watch()
        watches = self._watches.setdefault(subject.lower(), set())
        watches.add(watch)
        try:
            async with asyncio.timeout(seconds) as watch.scope:
                yield
            if watch.denied:  # it came with the answer
                raise denied(watch.denied, what)
        except TimeoutError as error:  # nats-py's own is a subclass
            if watch.denied:
                raise denied(watch.denied, what) from None
            if watch.lost:
                raise FerryError("nats_unreachable", f"The connection to NATS was lost: {what}.") from None
            if not self.nats.is_connected:
                raise self._unreachable(self._last_failure) from error
            raise FerryError("no_answer", f"No answer within {seconds:g} s: {what}.") from None
        except nats.errors.NoRespondersError:
            raise FerryError("no_answer", f"Nobody listens on {subject!r}: {what}.") from None
        except (nats.js.errors.NoStreamResponseError, nats.js.errors.ServiceUnavailableError) as error:
            raise FerryError(
                "nats_unreachable",
                f"JetStream does not answer: {what}.",
                hint="Is JetStream enabled in the NATS server ('jetstream {}' or -js)?",
            ) from error
        except nats.errors.MaxPayloadError:
            raise FerryError("bad_request", f"The message is larger than NATS allows: {what}.") from None
        except nats.js.errors.Error:
            raise
        except (nats.errors.Error, OSError) as error:
            raise self._unreachable(error) from error
        finally:
            watches.discard(watch)
            if not watches:
                self._watches.pop(subject.lower(), None)

    async def request(self, subject: str, message: msgspec.Struct, reply: type[R], *, timeout: float) -> R:
        """Ask, and decode the answer as ``reply``; ``timeout`` in seconds.

        Raises the FerryError that the other side answered, or those of :meth:`within`.
        """
        async with self.within(timeout, subject, f"a request to {subject}"):
            answer = await self.nats.request(subject, wire.encode(message), timeout=timeout + 1)
        headers = answer.headers or {}
        if ERROR_CODE_HEADER in headers:
            raise error_of(answer.data, headers)
        try:
            decoded: R = wire.decode(answer.data, reply)
        except FerryError as error:
            raise FerryError("internal", f"The answer on {subject} is not of its form: {error.message}") from error
        return decoded

    async def publish(self, subject: str, message: msgspec.Struct) -> None:
        """Publish and make sure that the server took it. Raises the FerryErrors of :meth:`within`."""
        async with self.within(2.0, subject, f"publishing on {subject}"):
            await self.nats.publish(subject, wire.encode(message))
            await self.sync()
