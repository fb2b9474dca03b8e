"""The forms a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from nano_vllm.tokenizer.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; these two with a "cache_salt"
too.
"""

_FORMS = 'a string, a list of token ids, {"prompt": str} or {"prompt_token_ids": [int, ...]}'


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; a list of integers is one prompt."""
    if isinstance(prompts, (list, tuple)):
        is_one = prompts and all(isinstance(prompt, int) for prompt in prompts)
        return [prompts] if is_one else list(prompts)
    return [prompts]  # type: ignore[list-item]


def parse_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """The prompt's text, if it has one, and its token ids, which the caller has yet to validate.

    Raises ValueError for any other form, and for a text where there is no tokenizer.
    """
    value: object = prompt
    if isinstance(value, Mapping):
        names = set(value) - {"cache_salt"}
        if names == {"prompt"} and isinstance(value["prompt"], str):
            value = value["prompt"]
        elif names == {"prompt_token_ids"} and isinstance(value["prompt_token_ids"], (list, tuple)):
            value = value["prompt_token_ids"]
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(
                f"a text needs a tokenizer, but the engine runs with skip_tokenizer_init; give "
                f"token ids, got {value!r}"
            )
        if not value:
            raise ValueError("the prompt must not be empty, got ''")
        return value, tokenizer.encode(value)
    if isinstance(value, (list, tuple)):
        return None, list(value)
    raise ValueError(f"a prompt must be {_FORMS}, got {prompt!r}")


def cache_salt_of(prompt: Prompt) -> str | None:
    """The salt that comes with a prompt; not checked yet."""
    return prompt.get("cache_salt") if isinstance(prompt, Mapping) else None


def join_prompts(
    context: Prompt, continuation: Prompt, tokenizer: Tokenizer | None
) -> tuple[list[int], int]:
    """Token ids of a context and its continuation together, and where the latter begin."""
    text, token_ids = parse_prompt(context, tokenizer)
    next_text, next_ids = parse_prompt(continuation, tokenizer)
    if (text is None) != (next_text is None):
        raise ValueError(
            "context and continuation must both be texts or both be token ids, "
            f"got {context!r} and {continuation!r}"
        )
    start = len(token_ids)
    if text is None or next_text is None:
        token_ids = token_ids + next_ids
    else:
        assert tokenizer is not None
        token_ids = tokenizer.encode(text + next_text)
    if not start or start >= len(token_ids):
        raise ValueError(
            f"context and continuation must have at least one token each, got {start} and "
            f"{len(token_ids) - start}"
        )
    return token_ids, start
