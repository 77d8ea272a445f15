"""The privileged layer: podman, CRIU, namespaces, the parked socket. Runs as root on the node."""
