"""NATS: connection, service endpoints, the event log and the registry; alone imports nats."""

from __future__ import annotations

from quicferry import lean

# All that nats-py wants of it is its own version, to tell the server.
with lean.without("importlib.metadata"):
    from nats.aio import client

client.__version__ = lean.version("nats-py")
