"""Data only: every message, subject and error code that crosses a process boundary."""
