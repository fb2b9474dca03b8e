"""Server-sent events, and parts of large answers."""

from __future__ import annotations

from typing import Any

import msgspec

_ENCODER = msgspec.json.Encoder()
END = b"data: [DONE]\n\n"
"""What comes last."""


def event(value: Any) -> bytes:
    """One event of JSON."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


def encoded(value: Any) -> Any:
    """A part of what is still to be encoded, which then takes little more than a copy of this: to
    encode much in one go holds up all other threads.
    """
    return msgspec.Raw(_ENCODER.encode(value))


class EventTemplate:
    """An event of which all is known but one text: much quicker to fill than to encode.

    Args:
        example: the event with a text that occurs in it once.
        text: that text, of letters and digits.
    """

    def __init__(self, example: bytes, text: str) -> None:
        self._before, self._behind = example.split(b'"%b"' % text.encode())

    def filled(self, text: str) -> bytes:
        return self._before + _ENCODER.encode(text) + self._behind
