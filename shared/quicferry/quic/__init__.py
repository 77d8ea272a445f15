"""The two wrappers around QUIC and the two UDP seams under them; alone imports aioquic."""

from __future__ import annotations

from quicferry import lean

# aioquic checks a peer's certificate with these, which a server of ours never does: clients load them when they do.
with lean.later("service_identity", "certifi", "OpenSSL.crypto"):
    import aioquic.tls  # noqa: F401
