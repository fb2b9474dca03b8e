"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations


class StopStrings:
    """A growing text that ends where one of its stop strings is first complete.

    The outcome does not depend on how the text is cut into pieces: of several matches, the one that
    ends first counts, and of those that end together the longest.

    Args:
        stop: non-empty strings.
        include_in_text: keep the stop string in the text.
    """

    def __init__(self, stop: list[str], include_in_text: bool = False) -> None:
        self._stop = stop
        self._include = include_in_text
        self.text = ""
        """All text so far; up to the stop string once it was found."""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str, may_stop: bool = True) -> None:
        """Append a piece; where `may_stop` is false, no stop string can end within it."""
        if self.found is not None:
            return
        old_length = len(self.text)
        self.text += piece
        if not piece or not may_stop:
            return
        matches = []
        for stop in self._stop:
            start = self.text.find(stop, max(0, old_length + 1 - len(stop)))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if matches:
            end, start, self.found = min(matches)
            self.text = self.text[: end if self._include else start]

    @property
    def settled_text(self) -> str:
        """The text but for an end that may turn out to begin a stop string."""
        if self.found is not None or not self._stop:
            return self.text
        return self.text[: len(self.text) - max(map(self._overlap, self._stop))]

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop`, short of all of it, that ends the text."""
        for length in range(min(len(stop) - 1, len(self.text)), 0, -1):
            if self.text.endswith(stop[:length]):
                return length
        return 0
