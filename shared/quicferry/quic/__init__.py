"""The two wrappers around QUIC and the two UDP seams under them; alone imports aioquic."""
