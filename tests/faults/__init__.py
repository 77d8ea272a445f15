"""Everything made to fail between every two steps of a move, with real CRIU: `make test-faults`, `make soak`."""
