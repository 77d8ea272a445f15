"""quicferry: live migration of running QUIC servers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quicferry import lean

# structlog would load rich to print tracebacks, which ours never does, and msgspec typing_extensions for Pythons
# older than ours: together a sixth of an echo server's memory. Import structlog first to have it whole.
with lean.without("rich", "typing_extensions"):
    import msgspec  # noqa: F401
    import structlog  # noqa: F401

if TYPE_CHECKING:
    from quicferry.app import Connection, Meter, Migration, Pause, Policy, connect, ensure_certificate, serve
    from quicferry.protocol.errors import FerryError

__all__ = [
    "Connection",
    "FerryError",
    "Meter",
    "Migration",
    "Pause",
    "Policy",
    "connect",
    "ensure_certificate",
    "serve",
]


def __getattr__(name: str) -> Any:
    # Looked up when first used (PEP 562): the services that import only messages need no QUIC.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "quicferry.protocol.errors" if name == "FerryError" else "quicferry.app"
    return getattr(importlib.import_module(home), name)
