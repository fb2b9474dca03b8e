"""The forms a prompt may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from nano_vllm.tokenizer.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""

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
        if set(value) == {"prompt"} and isinstance(value["prompt"], str):
            value = value["prompt"]
        elif set(value) == {"prompt_token_ids"} and isinstance(
            value["prompt_token_ids"], (list, tuple)
        ):
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
