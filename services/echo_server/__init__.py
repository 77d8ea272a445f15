"""The echo server: an application of quicferry that knows nothing of QUIC's details or of migration."""
