"""Logic only: one migration as a state machine, and its replay. No I/O, no clock, no asyncio."""
