"""Finds stop strings in a text that comes in pieces."""

from __future__ import annotations

from functools import lru_cache


class StopStrings:
    """A growing text that ends where one of its stop strings is first complete.

    The outcome does not depend on how the text is cut into pieces: of several matches, the one that
    ends first counts, and of those that end together the longest. What a piece costs does not
    depend on how long the stop strings are (Knuth, Morris and Pratt, 1977).

    Args:
        stop: non-empty strings.
        include_in_text: keep the stop string in the text.
    """

    def __init__(self, stop: list[str], include_in_text: bool = False) -> None:
        self._stop = [(string, _borders(string)) for string in stop]
        self._matched = [0] * len(stop)
        """Of each: length of the longest beginning, short of all of it, that ends the text."""
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
        matches = []
        for index, (stop, borders) in enumerate(self._stop):
            length = self._matched[index]
            for place, character in enumerate(piece, old_length + 1):
                while length and stop[length] != character:
                    length = borders[length]
                length += stop[length] == character
                if length == len(stop):
                    if may_stop:
                        matches.append((place, place - length, stop))
                        break
                    length = borders[length]
            self._matched[index] = length
        if matches:
            end, start, self.found = min(matches)
            self.text = self.text[: end if self._include else start]

    @property
    def settled_text(self) -> str:
        """The text but for an end that may turn out to begin a stop string."""
        if self.found is not None or not self._stop:
            return self.text
        return self.text[: len(self.text) - max(self._matched)]


@lru_cache(maxsize=256)
def _borders(string: str) -> tuple[int, ...]:
    """For each length: that of the longest shorter beginning of the string that ends the beginning
    of this length.
    """
    borders = [0, 0]
    length = 0
    for character in string[1:]:
        while length and string[length] != character:
            length = borders[length]
        length += string[length] == character
        borders.append(length)
    return tuple(borders)
