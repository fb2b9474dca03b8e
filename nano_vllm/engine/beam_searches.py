"""The beam searches under way: which beams a step advances, and who takes whose place behind it."""

from __future__ import annotations

from collections.abc import Iterator

from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.engine.beam_group import BeamGroup, BeamMove
from nano_vllm.engine.running_sequences import RunningSequences
from nano_vllm.engine.waiting_queue import WaitingQueue
from nano_vllm.sequence import Sequence


class BeamSearches:
    """Beams are sequences that prefill: of each the last token is computed, and when that is done
    of all beams of a request, the next ones are chosen. A beam whose token is computed waits for
    the others with its blocks, or without where somebody else needs them.

    Args:
        running: those that run, beams among them.
        waiting: where beams queue that have to be computed again.
        block_manager: has their blocks.
    """

    def __init__(
        self, running: RunningSequences, waiting: WaitingQueue, block_manager: BlockManager
    ) -> None:
        self._running = running
        self._waiting = waiting
        self._block_manager = block_manager
        self._groups: dict[str, BeamGroup] = {}
        """By request."""

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._groups

    def add(self, request_id: str, group: BeamGroup) -> None:
        self._groups[request_id] = group

    def forget(self, request_id: str) -> None:
        """A request has ended, if it is one that searched."""
        self._groups.pop(request_id, None)

    def is_grown(self, sequence: Sequence) -> bool:
        """Whether it is a beam whose last token alone is to be computed, maybe without a slot."""
        return (
            sequence.request_id in self._groups
            and sequence.num_output_tokens > 0
            and sequence.num_uncomputed_tokens == 1
        )

    def grown(self, limit: int) -> list[Sequence]:
        """The oldest such beams that run."""
        return [sequence for sequence in self._running.prefilling if self.is_grown(sequence)][
            :limit
        ]

    def take(self, sequence: Sequence, candidates: list[tuple[int, float]]) -> bool:
        """Take in what may follow a beam, as BeamGroup does; once that is known of all beams of the
        request, the next ones go on.

        Returns:
            whether the search is over.
        """
        group = self._groups[sequence.request_id]
        if not group.take(sequence, candidates):
            return False
        moves = group.advance()
        if moves:
            self._carry_on(group, moves)
        return not moves

    def ends(self, request_id: str) -> Iterator[tuple[Sequence, str, str | None]]:
        """How the sequences of a search end, and why: the best hypotheses become the first of them,
        the others are of no use.
        """
        group = self._groups[request_id]
        hypotheses = group.hypotheses
        for place, sequence in enumerate(group.sequences):
            if place < len(hypotheses):
                found = hypotheses[place]
                del sequence.token_ids[sequence.num_prompt_tokens :]
                sequence.token_ids += found.token_ids
                sequence.cumulative_logprob = found.cumulative_logprob
                yield sequence, found.finish_reason, None
            else:
                yield sequence, "abort", "no beam is left"

    def _carry_on(self, group: BeamGroup, moves: list[BeamMove]) -> None:
        """Have the sequences carry on the beams of the next step; those of dropped ones first give
        up their blocks.
        """
        parents = {move.parent for move in moves}
        for sequence in group.sequences:
            if sequence not in parents:
                if sequence in self._running:
                    self._running.remove(sequence)
                self._block_manager.free(sequence)
        for parent, child, _ in moves:
            if child is not parent:
                child.token_ids = list(parent.token_ids)
                if parent in self._running and not self._running.is_full:
                    self._block_manager.fork(parent, child, parent.num_computed_tokens)
                    self._running.start(child)
        for _, child, token_id in moves:
            child.token_ids.append(token_id)
            if child not in self._running:
                self._waiting.push(child)
