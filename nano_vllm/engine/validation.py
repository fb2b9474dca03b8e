"""The one gate that every request passes before it can reach the scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nano_vllm._core import first_not_a_token
from nano_vllm.sampling_params import SamplingParams

MAX_SALT_LENGTH = 1024


def check_priority(priority: int, by_priority: bool) -> None:
    """Raise ValueError for what is no priority, or would be none to the scheduler."""
    # type(), as True is an int
    if type(priority) is not int or not -(2**31) <= priority < 2**31:
        raise ValueError(f"priority must be an integer in [-2^31, 2^31), got {priority!r}")
    if priority and not by_priority:
        raise ValueError(f"priority needs scheduling_policy='priority', got {priority}")


def check_cache_salt(salt: str | None) -> str | None:
    """The salt; ValueError for what is none."""
    is_text = isinstance(salt, str) and 1 <= len(salt) <= MAX_SALT_LENGTH
    # A lone surrogate has no UTF-8.
    if salt is not None and not (is_text and salt.encode(errors="ignore").decode() == salt):
        raise ValueError(
            f"cache_salt must be a string of 1 to {MAX_SALT_LENGTH} characters, got {salt!r:.100}"
        )
    return salt


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask of this engine."""

    vocab_size: int
    max_model_len: int
    has_tokenizer: bool

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise ValueError for the first thing that cannot be served."""
        self._check_prompt(prompt_token_ids)
        self._check_params(params)

    def _check_prompt(self, prompt_token_ids: list[int]) -> None:
        if not prompt_token_ids:
            raise ValueError("the prompt must hold at least one token, got none")
        place = first_not_a_token(prompt_token_ids, self.vocab_size)
        if place >= 0:
            raise ValueError(
                f"prompt token ids must be integers in [0, {self.vocab_size}), "
                f"got {prompt_token_ids[place]!r} at position {place}"
            )
        longest = self.max_model_len - 1
        if len(prompt_token_ids) > longest:
            raise ValueError(
                f"the prompt must have at most {longest} tokens, one less than max_model_len = "
                f"{self.max_model_len}, got {len(prompt_token_ids)}"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be a SamplingParams, got {params!r}")
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self.vocab_size:
                raise ValueError(
                    f"{name} must be at most the vocabulary's {self.vocab_size} tokens, got {value}"
                )
        if not self.has_tokenizer:
            for name in ("stop", "bad_words"):
                if getattr(params, name):
                    raise ValueError(
                        f"{name} needs a tokenizer, but the engine runs with skip_tokenizer_init, "
                        f"got {getattr(params, name)!r}"
                    )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self.vocab_size:
                raise ValueError(f"{name} must lie in [0, {self.vocab_size}), got {token_id}")
