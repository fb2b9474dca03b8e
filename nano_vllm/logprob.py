"""How likely a token is, by the name vLLM users know."""

from __future__ import annotations

import msgspec


class Logprob(msgspec.Struct, array_like=True, gc=False):
    """One token's log-probability under the raw logits.

    Of no class of Python's own: of these come hundreds of thousands, and Python's garbage collector
    would look at them all again and again, for a tenth of a second each time.
    """

    logprob: float
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None
