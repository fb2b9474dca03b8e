"""The beams of one request, each of them a sequence."""

from __future__ import annotations

from typing import NamedTuple

from nano_vllm.sampling.beam_search import BeamSearch, Hypothesis
from nano_vllm.sequence import Sequence


class BeamMove(NamedTuple):
    """A beam of the next step: the parent's tokens and one more, carried on by a sequence."""

    parent: Sequence
    child: Sequence
    """The parent itself, or one that has nothing else to carry on."""
    token_id: int


class BeamGroup:
    """Knows which sequence carries on which beam. Advanced by BeamSearches.

    Args:
        search: chooses the beams.
        sequences: beam_width of them, by index; the first computes the prompt for all.
    """

    def __init__(self, search: BeamSearch, sequences: list[Sequence]) -> None:
        self.search = search
        self.sequences = sequences
        self._live = sequences[:1]
        self._candidates: dict[Sequence, list[tuple[int, float]]] = {}

    def take(self, sequence: Sequence, candidates: list[tuple[int, float]]) -> bool:
        """Take in what may follow a beam.

        Args:
            sequence: a live one.
            candidates: tokens and their log-probabilities, in any order; none drops the beam.

        Returns:
            whether that is known of all live beams.
        """
        self._candidates[sequence] = sorted(candidates, key=lambda candidate: -candidate[1])
        return len(self._candidates) == len(self._live)

    def advance(self) -> list[BeamMove]:
        """The beams of the next step, once `take` has returned True; none when the search ends."""
        steps = self.search.advance([self._candidates[sequence] for sequence in self._live])
        self._candidates = {}
        parents = [self._live[step.parent] for step in steps]
        idle = [sequence for sequence in self.sequences if sequence not in parents]
        moves: list[BeamMove] = []
        for parent, step in zip(parents, steps, strict=True):
            taken = any(move.child is parent for move in moves)
            moves.append(BeamMove(parent, idle.pop(0) if taken else parent, step.token_id))
        self._live = [move.child for move in moves]
        return moves

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """What has been found so far, best first."""
        return self.search.hypotheses()
