"""Making streams and buckets where they are missing, and waiting for JetStream to come up."""

from __future__ import annotations

import asyncio
from typing import Final

import nats.js.errors
import structlog
from nats.js import api
from nats.js.kv import KeyValue

from quicferry.bus.connection import Bus
from quicferry.bus.refusals import refused
from quicferry.protocol.errors import FerryError

log = structlog.get_logger()

API_SECONDS: Final = 2.0
WAIT: Final = 0.1


async def ensure_stream(bus: Bus, config: api.StreamConfig) -> None:
    """Make the stream ``config.name`` unless it is there, in whatever form: an operator may have tuned it.

    Waits up to ``bus.patience`` for JetStream. Raises FerryError ``nats_unreachable`` or ``nats_denied``.
    """
    name = str(config.name)
    deadline = asyncio.get_running_loop().time() + bus.patience
    while True:
        try:
            if not await _exists(bus, name):
                await _make(bus, name, config)
                log.info("stream_made", stream=name)
            return
        except FerryError as error:
            if error.code == "nats_denied" or asyncio.get_running_loop().time() >= deadline:
                raise
        await asyncio.sleep(WAIT)  # JetStream needs a moment after the server's start


async def ensure_bucket(bus: Bus, name: str, *, history: int = 1, max_age: float | None = None) -> KeyValue:
    """The key-value bucket ``name``, made as nats.py and the ``nats`` command would make it; as above."""
    await ensure_stream(
        bus,
        api.StreamConfig(
            name=f"KV_{name}",
            subjects=[f"$KV.{name}.>"],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            max_msgs_per_subject=history,
            max_age=max_age,
            max_bytes=16 * 1024 * 1024,
            allow_rollup_hdrs=True,
            deny_delete=True,
            allow_direct=True,
            duplicate_window=min(max_age, 120.0) if max_age else 120.0,
        ),
    )
    return KeyValue(name=name, stream=f"KV_{name}", pre=f"$KV.{name}.", js=bus.js, direct=True)


async def _exists(bus: Bus, name: str) -> bool:
    subject = f"{bus.settings.jetstream_prefix}.STREAM.INFO.{name}"
    try:
        async with bus.within(API_SECONDS, subject, f"looking for the stream {name}"):
            await bus.js.stream_info(name)
    except nats.js.errors.NotFoundError:
        return False
    except nats.js.errors.APIError as error:
        raise refused(error, f"the stream {name}") from error
    return True


async def _make(bus: Bus, name: str, config: api.StreamConfig) -> None:
    subject = f"{bus.settings.jetstream_prefix}.STREAM.CREATE.{name}"
    try:
        async with bus.within(API_SECONDS, subject, f"making the stream {name}"):
            await bus.js.add_stream(config)
    except nats.js.errors.APIError as error:
        # Two services start at once: the other one's, of the same form, answers with success.
        raise refused(error, f"the stream {name}") from error
