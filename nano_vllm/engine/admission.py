"""Who may start: what a waiting sequence finds computed, and what it must leave to others."""

from __future__ import annotations

from collections.abc import Iterable

from nano_vllm.batch import Batch
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.engine.running_sequences import RunningSequences
from nano_vllm.engine.step_cost import StepCost
from nano_vllm.sequence import Sequence, SequenceStatus

ADMISSION_HORIZON = 64
"""Steps, by default. Simulated with prompts and outputs of all lengths, requests were done up to
11 % quicker than with 0, and as quick as with 128.
"""
MAX_PREEMPTIONS = 4
"""Of a sequence: then it is admitted where it and all that run can grow to their full length."""


class Admission:
    """Gives sequences that wait their blocks, where there is room for them.

    Args:
        block_manager: where blocks come from.
        running: those that run.
        splits_prompts: whether a prompt may be computed in chunks.
        horizon: steps for which those that run are to have blocks when another is admitted.
        cost: what computing a prompt takes; None if that is not known.
        host_block_seconds: what copying a block back from host memory takes; None for nothing.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        running: RunningSequences,
        splits_prompts: bool,
        horizon: int = ADMISSION_HORIZON,
        cost: StepCost | None = None,
        host_block_seconds: float | None = None,
    ) -> None:
        self.horizon = horizon
        self.host_block_seconds = host_block_seconds
        self._block_manager = block_manager
        self._running = running
        self._splits_prompts = splits_prompts
        self._cost = cost

    def admit(
        self, sequence: Sequence, siblings: Iterable[Sequence], batch: Batch, budget: int
    ) -> bool:
        """Give a waiting sequence blocks for all of its tokens; False, and none, without room.

        Args:
            sequence: the head of the queue.
            siblings: all sequences of its request.
            batch: gets the copies that are to be made before its step.
            budget: tokens that the step has left.
        """
        manager = self._block_manager
        if self._running.is_full:
            return False
        reserve = self._reserve(sequence)
        if manager.num_free_blocks <= reserve:
            return False
        if not _wants_prompt_logprobs(sequence):
            sibling = self._computed_sibling(sequence, siblings)
            manager.share_prefix(sequence, sibling, self._may_load)
        is_whole = sequence.num_uncomputed_tokens <= budget
        missing = manager.num_missing_blocks([sequence])
        if not (is_whole or self._splits_prompts) or missing + reserve > manager.num_free_blocks:
            manager.free(sequence)
            return False
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        manager.allocate(sequence, batch)
        return True

    def note_preemption(self, sequence: Sequence) -> None:
        """A sequence has to wait once more; one that had to too often goes before all others."""
        sequence.num_preemptions += 1
        sequence.is_protected |= sequence.num_preemptions >= MAX_PREEMPTIONS

    def _reserve(self, sequence: Sequence) -> int:
        """Blocks to leave free when the sequence is admitted.

        Those that running sequences will want within the next steps: else the new one would have to
        leave again. One that has left too often waits for so many that it never has to.
        """
        size, running = self._block_manager.num_blocks_for, self._running
        if sequence.num_preemptions < MAX_PREEMPTIONS:
            most = len(running) * (size(self.horizon) + 1)
            if most + size(sequence.num_tokens) <= self._block_manager.num_free_blocks:
                return most
            return running.peak_growth(self.horizon)
        grown = sum(size(s.max_num_tokens) for s in (sequence, *running))
        return grown - size(sequence.num_tokens) - sum(len(s.block_table) for s in running)

    def _computed_sibling(
        self, sequence: Sequence, siblings: Iterable[Sequence]
    ) -> Sequence | None:
        """A sequence of the same request to fork a fresh one from."""
        if sequence.num_output_tokens:
            return None
        for sibling in siblings:
            # One that has just come back may have blocks that this step computes: to copy them
            # would come too early.
            if sibling.status is SequenceStatus.RUNNING and sibling not in self._running.joining:
                return sibling
        return None

    def _may_load(self, num_blocks: int, num_before: int) -> bool:
        """Whether copying blocks back from host memory is quicker than to compute them, behind
        `num_before` others.
        """
        if self._cost is None or self.host_block_seconds is None:
            return True
        size = self._block_manager.block_size
        seconds = self._cost.prompt_seconds(num_blocks * size, num_before * size)
        return num_blocks * self.host_block_seconds < seconds


def _wants_prompt_logprobs(sequence: Sequence) -> bool:
    """Whether the whole prompt must be computed, for logits that the cache does not hold."""
    return (
        sequence.params.prompt_logprobs is not None
        and len(sequence.prompt_logprobs) < sequence.num_prompt_tokens
    )
