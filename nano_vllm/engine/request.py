"""A prompt on its way through the engine, with all its completions."""

from __future__ import annotations

from dataclasses import dataclass, field

from nano_vllm.engine.beam_group import BeamGroup
from nano_vllm.engine.stop_strings import StopStrings
from nano_vllm.logprob import Logprob
from nano_vllm.outputs import RequestMetrics
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence
from nano_vllm.tokenizer.detokenizer import Detokenizer


@dataclass(slots=True)
class Completion:
    """One sequence and the text made of it. Advanced by OutputProcessor."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    """None where no text is wanted."""
    text: StopStrings
    num_seen_tokens: int = 0
    """Output tokens whose text is in `text`."""
    num_told_tokens: int = 0  # set by delta_of, as are the next two
    """Output tokens that deltas have told."""
    num_told_chars: int = 0
    is_told: bool = False
    """Whether its end was told."""


@dataclass(slots=True)
class Request:
    """What the engine knows of one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    stream: bool
    """Whether every step's progress is reported, not the final result alone."""
    beams: BeamGroup | None = None
    """Where the completions are the beams of a search."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    is_told: bool = False  # set by delta_of
    """Whether a delta has told of it."""

    @property
    def sequences(self) -> list[Sequence]:
        return [completion.sequence for completion in self.completions]

    @property
    def is_finished(self) -> bool:
        return all(completion.sequence.is_finished for completion in self.completions)

    @property
    def num_preemptions(self) -> int:
        return sum(completion.sequence.num_preemptions for completion in self.completions)

    @property
    def has_logprobs(self) -> bool:
        """Whether those of its output are reported."""
        return self.params.logprobs is not None and self.beams is None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.completions[0].sequence.num_cached_tokens

    @property
    def results(self) -> list[Completion]:
        """The completions to report, in order: of more than n, the likeliest."""
        if self.beams is not None:
            found = max(1, len(self.beams.hypotheses))
            return self.completions[: min(found, self.params.n)]
        # A stream has told their places.
        if len(self.completions) == self.params.n or not self.is_finished:
            return self.completions[: self.params.n]
        # One that was cut off has a large sum, as it has few tokens.
        by_logprob = sorted(
            (completion.sequence for completion in self.completions),
            key=lambda s: (s.finish_reason == "abort", -s.cumulative_logprob),
        )
        return [self.completions[sequence.index] for sequence in by_logprob[: self.params.n]]

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        return self.completions[0].sequence.prompt_logprobs
