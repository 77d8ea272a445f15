"""The car client: pings an echo server and measures what a move costs it."""
