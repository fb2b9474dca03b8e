"""What a request returns: the names and meanings vLLM users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nano_vllm.logprob import Logprob


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of the engine's clock."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token: the token's own entry and those of the likeliest ones."""
    finish_reason: str | None = None
    """stop, length, abort; None while running."""
    stop_reason: int | str | None = None
    """The stop token or string that ended the text, or why it was aborted."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""


@dataclass(slots=True)
class ScoreOutput:
    """How likely a model finds a continuation behind its context."""

    token_ids: list[int]
    """Of the continuation."""
    logprobs: list[float]
    """Of each token, given all before it, under the raw logits."""
    is_greedy: bool
    """Whether each token was the likeliest."""

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(self.logprobs)
