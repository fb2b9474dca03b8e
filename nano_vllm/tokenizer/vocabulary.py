"""What a file of tokens comes to, before what stands beside it is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import tokenizers

MAX_TOKEN_LENGTH = 1024
MAX_TOTAL_LENGTH = 8 << 20
"""The largest well-known vocabularies have a sixth of that. Both limits together bound the time in
which all ways to make a token are found.
"""


@dataclass(frozen=True)
class Vocabulary:
    """What splits and joins a text, and what its file says of the tokens around a text."""

    backend: tokenizers.Tokenizer
    named: dict[str, str] = field(default_factory=dict)
    """bos_token and the like, as far as the file names them."""
    adds_bos: bool = False
    """Unless tokenizer_config.json says otherwise."""


def check_lengths(tokens: Collection[str] | Collection[bytes]) -> None:
    """ValueError for tokens too long to be those of a vocabulary."""
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN_LENGTH:
        raise ValueError(f"a token must have a length of at most {MAX_TOKEN_LENGTH}, got {longest}")
    total = sum(map(len, tokens))
    if total > MAX_TOTAL_LENGTH:
        raise ValueError(
            f"all tokens together must have a length of at most {MAX_TOTAL_LENGTH}, got {total}"
        )
