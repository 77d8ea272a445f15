"""NATS micro endpoints: decode, call, encode, and errors that a caller in any language can read."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import nats.errors
import structlog
from nats.micro import add_service
from nats.micro.request import Handler, Request
from nats.micro.service import EndpointStats, Service, ServiceConfig

from quicferry import faults, lean
from quicferry.bus.connection import Bus
from quicferry.protocol import wire
from quicferry.protocol.api import ErrorReply
from quicferry.protocol.errors import FerryError

log = structlog.get_logger()

HANDLER_SECONDS: Final = 10.0
"""Requests to one endpoint are handled one after another, so a handler is quick: it accepts and starts a task."""
START_SECONDS: Final = 5.0
STOP_SECONDS: Final = 0.5
_NOT_IN_A_HEADER = re.compile(r"[^\x20-\x7e]+")


class Endpoint(msgspec.Struct, frozen=True):
    """One subject, what is asked there and who answers."""

    name: str
    subject: str
    request: type
    handler: Callable[[Any], Awaitable[msgspec.Struct]]


@contextlib.asynccontextmanager
async def serve(
    bus: Bus,
    *,
    name: str,
    description: str,
    endpoints: Sequence[Endpoint],
    queue_group: str | None = None,
    metadata: Mapping[str, str] | None = None,
    answering: Callable[[], bool] | None = None,
) -> AsyncIterator[None]:
    """Answer ``endpoints`` as the NATS micro service ``name`` for as long as the context lasts.

    A FerryError becomes an ``ErrorReply`` with the micro error headers; anything else is logged and answered
    with ``internal``. A request without a reply subject is handled and not answered. Instances with the same
    ``queue_group`` share the requests. While ``answering`` says False, requests are passed over in silence: another
    instance has them too. Raises FerryError ``nats_denied`` if a subject may not be subscribed to, and those of
    ``Bus.within``.
    """
    refused: dict[str, int] = {endpoint.subject: 0 for endpoint in endpoints}

    def refusals(stats: EndpointStats) -> dict[str, int]:
        # nats-py's own count knows only errors that were raised, and those lose their body.
        return {"refused": refused.get(stats.subject, 0)}

    config = ServiceConfig(
        name=name,
        version=lean.version("quicferry"),
        description=description,
        metadata=dict(metadata or {}),
        queue_group=queue_group,
        stats_handler=refusals,
    )
    async with bus.within(START_SECONDS, "", f"starting the service {name}"):
        service = await add_service(bus.nats, config)  # it waits for the server, and its errors are nats-py's
    try:
        async with bus.within(START_SECONDS, "", f"starting the service {name}"):
            for endpoint in endpoints:
                await service.add_endpoint(
                    name=endpoint.name,
                    subject=endpoint.subject,
                    handler=_handler(endpoint, refused, answering),
                    metadata={},
                )
            await bus.sync()
        for endpoint in endpoints:
            if bus.subscription_denied(endpoint.subject):
                raise FerryError(
                    "nats_denied",
                    f"NATS refused the subscription to {endpoint.subject!r}.",
                    hint="The permissions of the NATS user in the server's configuration decide.",
                )
        yield
    finally:
        await _stop(service)


async def _stop(service: Service) -> None:
    with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):  # the connection may be gone already
        async with asyncio.timeout(STOP_SECONDS):
            await service.stop()


def _handler(endpoint: Endpoint, refused: dict[str, int], answering: Callable[[], bool] | None) -> Handler:
    async def handle(request: Request) -> None:
        if answering is not None and not answering():
            log.debug("request_passed_over", endpoint=endpoint.name)
            return
        try:
            await faults.at(f"asked.{endpoint.subject}")
            message = wire.decode(request.data, endpoint.request)
            async with asyncio.timeout(HANDLER_SECONDS):
                answer = await endpoint.handler(message)
            if await faults.at(f"answer.{endpoint.subject}") == "lost":
                return
            await _respond(request, wire.encode(answer))
        except FerryError as error:
            refused[endpoint.subject] += 1
            log.info("request_refused", endpoint=endpoint.name, code=error.code, path=error.path, error=error.message)
            await _refuse(request, error)
        except Exception as error:  # a defect of ours must neither end the service nor leak its insides
            refused[endpoint.subject] += 1
            log.exception("request_failed", endpoint=endpoint.name)
            slow = isinstance(error, TimeoutError)
            what = f"took longer than {HANDLER_SECONDS:g} s" if slow else "failed"
            await _refuse(
                request,
                FerryError(
                    "internal", f"The request to {endpoint.name!r} {what}.", hint="The service's log has the details."
                ),
            )

    return handle


async def _respond(request: Request, body: bytes, headers: dict[str, str] | None = None) -> None:
    if not request._msg.reply:  # a plain publish; nats-py has no public way to ask
        return
    try:
        await request.respond(body, headers=headers)
    except nats.errors.Error as error:
        log.warning("answer_lost", subject=request.subject, error=str(error))


async def _refuse(request: Request, error: FerryError) -> None:
    headers = {
        "Nats-Service-Error": _NOT_IN_A_HEADER.sub(" ", error.message)[:200],
        "Nats-Service-Error-Code": error.code,
    }
    await _respond(request, wire.encode(ErrorReply(error=error.body())), headers)
