"""What is put off while clients wait: seconds.

From the freeze until the target's first answers the processors are for CRIU, the commit and the server. Every event
that is written and every line that is logged meanwhile wakes NATS and the coordinator, who then go first on a machine
with few cores. Nobody waits for what is here; a limit bounds what is put off until something else has happened.
"""

from __future__ import annotations

from typing import Final

HELD_WITHIN: Final = 0.05
"""The log is told that the source stands still when the dump has ended, or so long after it began."""
DUMPED: Final = 0.001
"""From the end of the dump until the log is told: the target's CRIU is being given the images."""
LOGGED: Final = 0.05
"""From an entry of the log to the coordinator's line about it."""
RESUME_ANSWERED: Final = 0.01
"""From a request to resume to its answer; the step begins at once."""
RESUMED: Final = 0.005
"""From the moment the target has its socket until its agent tells the log."""
ADOPTED: Final = 0.005
"""From that moment until the server itself logs it and turns to NATS again."""
SOURCE_KILLED: Final = 0.05
"""From the request to release the source, which is frozen and can't send, until it is killed."""
IMAGES_DELETED: Final = 0.1
"""From the end of a resume until the images are deleted."""
