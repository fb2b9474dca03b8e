"""How much of a prompt a step may hold so that running streams keep their pace."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from collections.abc import Sequence as Sizes

from nano_vllm.batch import Batch, StepWork
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.engine.running_sequences import RunningSequences
from nano_vllm.engine.step_cost import StepCost
from nano_vllm.sequence import Sequence


class PrefillPace:
    """Says how much of a prompt a step may hold while somebody follows its decodes.

    Args:
        limit: seconds between two tokens of a running stream; None for twice what they are without
            prompts, 0 for as many as there may be.
        saturating_tokens: as in StepCost.
        spread: behind so many tokens of a prompt, parts of up to so many are shared out among all
            of the device; longer ones would take far longer. None where there is no difference.
        padded: ascending, what a step's tokens are padded to: it takes as long as so many. Steps of
            more than the last are as they are.
    """

    MAX_STEPS = 32
    """So many steps with prompts in a row; then one without shows what decodes take by now."""

    def __init__(
        self,
        limit: float | None = None,
        saturating_tokens: int = 1,
        spread: tuple[int, int] | None = None,
        padded: Sizes[int] = (),
    ) -> None:
        self.cost = StepCost(saturating_tokens)
        self.limit = limit
        self.spread = spread
        self.padded = padded
        self._num_steps = 0
        self._tail = _Tail()

    def observe(self, work: StepWork, seconds: float) -> None:
        """Take in a step, and the seconds from the result before to its own."""
        if work.prefill_tokens:
            work = work._replace(prefill_tokens=self._padded(work.num_decodes, work.prefill_tokens))
            if self.cost.knows(work.prefill_tokens):
                self._tail.see(seconds / self.cost.predict(work))
        self.cost.observe(work, seconds)
        if work.prefill_tokens:
            self._num_steps += 1
        elif not self.cost.doubts_decodes:
            self._num_steps = 0

    def max_prefill_tokens(
        self, num_decodes: int, decode_context: int, prefill_context: int
    ) -> int:
        """As `StepCost.max_prefill_tokens`, but 0 once every MAX_STEPS."""
        if self.limit == 0:
            return sys.maxsize
        if self._num_steps >= self.MAX_STEPS:
            return 0
        limit = self.limit
        if limit is None:
            limit = 2.0 * self.cost.predict(StepWork(num_decodes, decode_context, 0, 0))
        num_tokens = self.cost.max_prefill_tokens(
            limit / self._tail.ratio, num_decodes, decode_context, prefill_context
        )
        if self.spread is not None and prefill_context >= self.spread[0]:
            num_tokens = min(num_tokens, self.spread[1])
        return self._filled(num_decodes, num_tokens)

    def _padded(self, num_decodes: int, num_tokens: int) -> int:
        """Tokens of prompts and padding in a step with so many."""
        total = num_decodes + num_tokens
        at = bisect_left(self.padded, total)
        return num_tokens if at == len(self.padded) else self.padded[at] - num_decodes

    def _filled(self, num_decodes: int, num_tokens: int) -> int:
        """Tokens without padding, and not much fewer: the next size would take longer."""
        total = num_decodes + num_tokens
        at = bisect_right(self.padded, total)
        if at in (0, len(self.padded)):
            return num_tokens
        filled = self.padded[at - 1] - num_decodes
        return filled if 2 * filled >= num_tokens else num_tokens


class PrefillBudget:
    """Tokens of prompts that go into a step: what its decodes leave of the step's budget; beside
    sequences that are streamed, no more than keeps their pace.

    Args:
        max_num_batched_tokens: tokens of a step.
        pace: of the streams; None where prompts need not mind them.
        running: those that run.
        block_manager: has their blocks.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        pace: PrefillPace | None,
        running: RunningSequences,
        block_manager: BlockManager,
    ) -> None:
        self._max_num_batched_tokens = max_num_batched_tokens
        self._pace = pace
        self._running = running
        self._block_manager = block_manager

    def tokens(self, num_decodes: int, first: Sequence | None) -> int:
        """What a step with prompts may hold of them.

        Args:
            num_decodes: of the step.
            first: the prompt that comes first; None for one of which nothing is computed.
        """
        budget = self._max_num_batched_tokens - num_decodes
        if self._pace is None or not (self._running.num_streams and num_decodes):
            return budget
        computed = 0 if first is None else first.num_computed_tokens
        pace = self._pace.max_prefill_tokens(num_decodes, self._decode_context(), computed)
        return min(budget, pace)

    def observe(self, batch: Batch, seconds: float) -> None:
        """See Scheduler.observe."""
        if self._pace is None:
            return
        num_decodes, context = batch.num_decodes, self._decode_context(self._running.joining)
        num_tokens = num_pairs = 0
        for scheduled in batch.scheduled[num_decodes:]:
            num, computed = scheduled.num_tokens, scheduled.start
            if num == 1:  # a beam, or at the cost of one
                num_decodes += 1
                context += computed + 1
            else:
                num_tokens += num
                num_pairs += self._pace.cost.pairs(num, computed)
        self._pace.observe(StepWork(num_decodes, context, num_tokens, num_pairs), seconds)

    def _decode_context(self, joining: Collection[Sequence] = ()) -> int:
        """Tokens that the rows attend over, to a block; one that they share counts once.

        Args:
            joining: rows to leave out.
        """
        manager = self._block_manager
        num_blocks = manager.num_blocks - manager.num_free_blocks
        others = (*self._running.prefilling, *joining)
        num_blocks -= sum(len(sequence.held_blocks) for sequence in others)
        return max(num_blocks, 0) * manager.block_size


class _Tail:
    """How much longer than predicted all but one step in a hundred take at the most: the promise is
    about the slow ones. A quantile, found step by step: it rises seldom by much, and else falls by
    a little.
    """

    SLOW_SHARE = 0.01
    RATE = 0.03
    """What a step changes of it at the most."""
    LEAST, MOST = 1.02, 1.25
    HELD_UP = 2.0
    """Times its prediction that a step takes which something else than its work held up."""

    def __init__(self) -> None:
        self.ratio = 1.07

    def see(self, ratio: float) -> None:
        """Take in by how much longer than predicted a step was."""
        if ratio < self.HELD_UP:
            change = self.RATE * ((ratio > self.ratio) - self.SLOW_SHARE)
            self.ratio = min(max(self.ratio + change, self.LEAST), self.MOST)
