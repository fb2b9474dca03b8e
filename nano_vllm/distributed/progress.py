"""How far a rank is, as its watchdog tells the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Written by the thread that computes, read by the watchdog's."""

    def __init__(self) -> None:
        self.step = -1
        """The last one begun; -1 while the model loads."""
        self.waiting_since: float | None = None
        """By the monotonic clock, where it is in a collective that others have not joined."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a call that returns once others make it too."""
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None
