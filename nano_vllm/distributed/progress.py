"""How far a rank is, as its watchdog tells the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 20.0
"""Seconds behind which a rank is frozen that has not joined the collective that others wait in."""


class Progress:
    """Written by the thread that computes, read by the watchdog's."""

    def __init__(self) -> None:
        self.step = -1
        """The last one begun; -1 while the model loads."""
        self.waiting_since: float | None = None
        """By the monotonic clock, where it is in a collective that others have not joined."""
        self.patience = PATIENCE

    @contextmanager
    def waiting(self, patience: float = PATIENCE) -> Iterator[None]:
        """Around a call that returns once others make it too.

        Args:
            patience: seconds that they may come later without being frozen.
        """
        self.patience = patience
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None
