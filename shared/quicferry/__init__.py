"""quicferry: live migration of running QUIC servers."""
