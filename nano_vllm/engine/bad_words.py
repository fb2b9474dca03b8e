"""The token sequences that spell a bad word."""

from __future__ import annotations

from nano_vllm.tokenizer.tokenizer import Tokenizer


def bad_word_token_ids(
    words: list[str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens, at the beginning of a text and behind a space.

    A word can be spelt with other tokens too, as part of a longer one or cut differently; those
    spellings are not ruled out.
    """
    spellings: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word.lstrip()}"):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if token_ids and max(token_ids) < vocab_size:
                spellings[token_ids] = None
    return tuple(spellings)
