"""The benchmark: moves under load beside the alternatives, measured from the client. docs/performance.md reads it."""
