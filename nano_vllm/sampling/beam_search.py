"""Beam search: which beams go on and which have ended. Knows nothing of models and caches."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from nano_vllm.sampling_params import BeamSearchParams


class BeamStep(NamedTuple):
    """How a beam of the next step comes from one of this step."""

    parent: int
    """Index among the live beams of this step."""
    token_id: int


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beam that has ended."""

    token_ids: list[int]
    """Generated tokens, the end token among them."""
    cumulative_logprob: float
    score: float
    """cumulative_logprob / len(token_ids) ** length_penalty."""
    finish_reason: str
    """stop, length."""


class _Beam(NamedTuple):
    token_ids: list[int]
    logprob: float
    """Of all of them."""


class BeamSearch:
    """The beams of one prompt, which all grow by one token a step.

    A step ranks the likeliest continuations of all live beams. Those that end, among the first
    beam_width, become hypotheses, of which the best beam_width are kept; of those that do not end,
    the first beam_width live on. Equals rank by beam, then as its candidates stand.

    Source: `generate(num_beams=...)` of transformers 5, GenerationMixin._beam_search. There too a
    single beam is greedy search: it ends with its first end token.

    Args:
        end_token_ids: tokens that end a beam.
        max_tokens: tokens of a beam at the most: params.max_tokens, or what the context holds.
    """

    def __init__(
        self, params: BeamSearchParams, end_token_ids: frozenset[int], max_tokens: int
    ) -> None:
        self.params = params
        self.end_token_ids = end_token_ids
        self.max_tokens = max_tokens
        self.num_candidates = max(2, 1 + len(end_token_ids)) * params.beam_width
        """Likeliest tokens to look at for each beam: if all the beams' end tokens are among them,
        beam_width others are too.
        """
        self.num_tokens = 0
        """Generated tokens of each live beam."""
        self._live = [_Beam([], 0.0)]  # likeliest first
        self._hypotheses: list[Hypothesis] = []  # best first, beam_width at the most

    @property
    def num_live(self) -> int:
        """Beams that the next step computes: 1 at first, 0 when the search is over."""
        return len(self._live)

    def advance(self, candidates: list[list[tuple[int, float]]]) -> list[BeamStep]:
        """Add a token to each beam.

        Args:
            candidates: [num_live]; each beam's likeliest tokens with their log-probabilities in
                falling order, num_candidates of them or the whole vocabulary. An empty list drops
                the beam; a log-probability of -inf or NaN is no candidate.

        Returns:
            the beams of the next step, likeliest first; none when the search is over.
        """
        assert len(candidates) == self.num_live > 0, (len(candidates), self.num_live)
        beam_width = self.params.beam_width
        self.num_tokens += 1
        live: list[_Beam] = []
        steps: list[BeamStep] = []
        for rank, (logprob, parent, token_id) in enumerate(self._ranked(candidates)):
            ends = token_id in self.end_token_ids
            if not ends and self.num_tokens < self.max_tokens:
                if len(live) < beam_width:
                    live.append(_Beam([*self._live[parent].token_ids, token_id], logprob))
                    steps.append(BeamStep(parent, token_id))
            elif rank < beam_width:
                token_ids = [*self._live[parent].token_ids, token_id]
                score = logprob / self._penalty(self.num_tokens)
                reason = "stop" if ends else "length"
                self._hypotheses.append(Hypothesis(token_ids, logprob, score, reason))
        self._hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self._hypotheses[beam_width:]
        self._live = live
        if self._is_over():
            self._live = []
            return []
        return steps

    def hypotheses(self, n: int | None = None) -> list[Hypothesis]:
        """The n best, or all beam_width, best first; fewer only where beams were dropped."""
        return self._hypotheses[:n]

    def _ranked(self, candidates: list[list[tuple[int, float]]]) -> islice[tuple[float, int, int]]:
        """Log-probability of the whole beam, parent and token of the likeliest continuations."""
        of_beams = (
            [
                (beam.logprob + logprob, parent, token_id)
                for token_id, logprob in candidates[parent][: self.num_candidates]
                if logprob > -math.inf
            ]
            for parent, beam in enumerate(self._live)
        )
        merged = heapq.merge(*of_beams, key=lambda candidate: candidate[0], reverse=True)
        return islice(merged, self.num_candidates)

    def _is_over(self) -> bool:
        """Whether nothing is left to follow, or not worth it: early_stopping."""
        params = self.params
        if not self._live:
            return True
        if len(self._hypotheses) < params.beam_width:
            return False
        if params.early_stopping is True or params.beam_width == 1:
            return True
        hopes_for_length = params.early_stopping == "never" and params.length_penalty > 0
        length = self.max_tokens if hopes_for_length else self.num_tokens
        return self._live[0].logprob / self._penalty(length) <= self._hypotheses[-1].score

    def _penalty(self, num_tokens: int) -> float:
        return float(num_tokens) ** self.params.length_penalty
