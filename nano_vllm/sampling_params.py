"""How a request is sampled: the names and meanings vLLM users know."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from nano_vllm.config import reject_unknown

MAX_LOGPROBS = 1024
"""Likeliest tokens that are reported, or looked at by a beam search."""


@dataclass(frozen=True)
class SamplingParams:
    """What to generate for one prompt.

    Raises ValueError, naming the value and what is allowed, for anything out of range.
    """

    n: int = 1
    """Completions per prompt."""
    best_of: int | None = None
    """Completions to generate, of which the n likeliest are returned; None for n."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach this; in (0, 1]."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest; in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens generated before; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was generated before; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or generated before;
    above 0.
    """
    seed: int | None = None
    """Makes the draws of this request repeatable, whatever else runs beside it."""
    stop: str | list[str] | None = None
    """Strings that end the text when they appear in it."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    max_tokens: int | None = 16
    """Tokens to generate at the most; None for as many as the context holds."""
    min_tokens: int = 0
    """Tokens to generate before any end is allowed."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many likeliest ones, from the raw
    logits.
    """
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    detokenize: bool = True
    """Make text of the tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of single tokens; values in [-100, 100]."""
    allowed_token_ids: list[int] | None = None
    """Only these tokens can be generated."""
    bad_words: list[str] | None = None
    """Strings whose token sequences are never completed."""

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, 1024)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, 1, 1024)
            if self.best_of < self.n:
                raise ValueError(f"best_of must be at least n = {self.n}, got {self.best_of}")
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        # Less would be 0 to the kernels, whose numbers are of 32 bits.
        _check_float("repetition_penalty", self.repetition_penalty, 1e-30, 100.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens = {self.max_tokens}, got {self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
        ):
            _check_flag(name, getattr(self, name))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        for name in ("stop", "bad_words"):
            for text in _listed(name, getattr(self, name)):
                if not isinstance(text, str) or not text:
                    raise ValueError(f"{name} must hold non-empty strings, got {text!r}")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in _listed(name, getattr(self, name)):
                _check_int(name, token_id, 0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one token, got []")
        if not isinstance(self.logit_bias, dict | None):
            raise ValueError(f"logit_bias must be a dict by token id, got {self.logit_bias!r:.100}")
        for token_id, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token_id, 0)
            _check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    @classmethod
    def from_options(cls, options: dict) -> SamplingParams:
        """Build from a mapping; an unknown name raises ValueError with the nearest known one."""
        reject_unknown(options, [f.name for f in fields(cls)])
        return cls(**options)

    @property
    def num_sequences(self) -> int:
        """That run at the same time."""
        return self.best_of or self.n

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class BeamSearchParams:
    """How to search for the likeliest completions of one prompt.

    Raises ValueError, naming the value and what is allowed, for anything out of range.
    """

    beam_width: int
    """Beams that are followed at a time; one is greedy search."""
    max_tokens: int
    """Tokens to generate at the most."""
    temperature: float = 0.0
    """Only 0: beams are compared by the log-probabilities of the raw logits."""
    length_penalty: float = 1.0
    """A completion's score is its log-probability divided by its number of tokens to this power;
    above 0 favours long ones, below 0 short ones; in [-10, 10].
    """
    early_stopping: bool | str = False
    """When to stop, once beam_width completions have ended: True at once; False when the likeliest
    beam, scored as if it ended now, is no better than the worst of them; "never" when it cannot
    become better, for which a length_penalty above 0 counts max_tokens as its length.
    """
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    n: int | None = None
    """Completions to return, the best ones; None for all beam_width."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a completion."""

    def __post_init__(self) -> None:
        _check_int("beam_width", self.beam_width, 1, 1024)
        _check_int("max_tokens", self.max_tokens, 1)
        if self.temperature != 0:
            raise ValueError(
                f"temperature must be 0 in a beam search, which draws nothing, "
                f"got {self.temperature!r}"
            )
        _check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f"early_stopping must be True, False or 'never', got {self.early_stopping!r}"
            )
        if self.n is not None:
            _check_int("n", self.n, 1)
            if self.n > self.beam_width:
                raise ValueError(f"n must be at most beam_width = {self.beam_width}, got {self.n}")
        _check_flag("ignore_eos", self.ignore_eos)
        for token_id in _listed("stop_token_ids", self.stop_token_ids):
            _check_int("stop_token_ids", token_id, 0)

    @property
    def num_sequences(self) -> int:
        """That run at the same time."""
        return self.beam_width


def _listed(name: str, values: object) -> Collection[Any]:
    """Its elements; () for None."""
    if values is None:
        return ()
    if not isinstance(values, list | tuple | set | frozenset):
        raise ValueError(f"{name} must be a list, got {values!r:.100}")
    return values


def _check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r:.100}")


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    allowed = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value > high)
    ):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value}")


def _check_float(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    bracket = "(" if open_low else "["
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN is in no range.
    if not ok or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        raise ValueError(
            f"{name} must be a finite number in {bracket}{low:g}, {high:g}], got {value!r}"
        )
