"""Ctrl-C between two steps and not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class InterruptsWait:
    """A context: a SIGINT within it counts when it ends, so that nothing is left half done. A
    second one counts at once.
    """

    def __enter__(self) -> None:
        self._seen: tuple[int, FrameType | None] | None = None
        is_main = threading.current_thread() is threading.main_thread()
        self._handler = signal.getsignal(signal.SIGINT) if is_main else None
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_second, self._seen = self._seen is not None, (number, frame)
        if is_second and callable(self._handler):
            self._handler(number, frame)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._handler)
            if self._seen is not None and not isinstance(error, KeyboardInterrupt):
                self._handler(*self._seen)
