"""Picks what the next step computes, and takes in what came of it."""

from __future__ import annotations

from collections import deque

from nano_vllm._core import DecodeRows, DecodeStep
from nano_vllm.batch import Batch, ScheduledSequence, StepResult
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.sequence import Sequence, SequenceStatus


class Scheduler:
    """Continuous batching: every step is filled anew, up to a budget of tokens.

    Running sequences come first, in the order of their admission, then waiting ones, first come
    first served. A prompt longer than what is left of the budget is computed in chunks over several
    steps, if allowed. When the pool is dry, the newest running sequence loses its blocks and goes
    back to the head of the queue with the tokens it has generated; they are computed again as part
    of its prompt. The completions of one request wait for the first of them to compute the prompt,
    then fork from it.

    Pure: no clock, no randomness, no device. Every step that has work computes at least one token
    of the oldest running sequence, so every sequence ends.

    Those that decode are rows in C++, which a step walks over, takes blocks for and appends tokens
    to without Python; Python sees to the rows that end, and to all others.

    Invariants between steps: waiting sequences hold no blocks; at most one running sequence is
        still in prefill, and it is the newest, with blocks for all of its tokens; no block of a
        running sequence that is not full is shared; the rows are the other running sequences, in
        their order.

    Args:
        block_manager: where blocks come from.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: tokens of a step.
        max_model_len: tokens of a sequence, prompt and output together.
        enable_chunked_prefill: whether a prompt may be split over steps.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
    ) -> None:
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"without chunked prefill max_num_batched_tokens must be at least max_model_len = "
                f"{max_model_len}, got {max_num_batched_tokens}"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        """In the order of admission."""
        self._rows = DecodeRows(block_manager.allocator, max_num_seqs)
        self._requests: dict[str, list[Sequence]] = {}
        """Sequences of each unfinished request, by index."""
        self._held: dict[str, list[Sequence]] = {}
        """Sequences that wait for the first of their request to compute the prompt."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._running)

    @property
    def running(self) -> list[Sequence]:
        """In the order of admission."""
        return list(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + sum(map(len, self._held.values()))

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request, of which the first alone may ask for prompt_logprobs.

        Raises ValueError, and queues nothing, where one of them could outgrow the whole pool.
        """
        first = sequences[0]
        self.check_fits(first.num_prompt_tokens, first.params.max_tokens)
        if first.params.prompt_logprobs is not None:
            first.prompt_logprobs = [None]  # nothing predicts the first token
        self._requests[first.request_id] = sequences
        self.waiting.append(first)
        if len(sequences) > 1:
            self._held[first.request_id] = sequences[1:]

    def check_fits(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Raise ValueError for a sequence that the pool could not hold even if it were empty."""
        longest = self.max_model_len
        if max_tokens is not None:
            longest = min(longest, num_prompt_tokens + max_tokens)
        manager = self.block_manager
        if manager.num_blocks_for(longest) > manager.num_blocks:
            raise ValueError(
                f"{num_prompt_tokens} prompt tokens and max_tokens = {max_tokens} need room for "
                f"{longest} tokens, but the KV cache holds {manager.num_blocks} blocks of "
                f"{manager.block_size} = {manager.num_blocks * manager.block_size} tokens"
            )

    def abort(self, request_id: str) -> list[Sequence]:
        """End what is unfinished of a request, and return it; unknown requests have nothing."""
        self._held.pop(request_id, None)
        unfinished = [s for s in self._requests.get(request_id, ()) if not s.is_finished]
        for sequence in unfinished:
            self.finish(sequence, "abort")
        return unfinished

    def finish(
        self, sequence: Sequence, finish_reason: str, stop_reason: int | str | None = None
    ) -> None:
        """End a sequence and free its blocks; the next step gives its place away."""
        if sequence in self._running:
            self._stop_running(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = finish_reason
        sequence.stop_reason = stop_reason
        self.block_manager.free(sequence)
        self._release_held(sequence)
        if all(s.is_finished for s in self._requests[sequence.request_id]):
            del self._requests[sequence.request_id]

    def schedule(self) -> Batch | None:
        """The next step; None if nothing is left to do."""
        if not self.has_work:
            return None
        batch = Batch([])
        decodes, dry = self._schedule_decodes(batch)
        budget = self.max_num_batched_tokens - len(decodes)
        if budget > 0 and len(self._rows) < self.num_running:
            budget -= self._put(batch, next(reversed(self._running)), budget)
        if not dry:
            self._admit(batch, budget)
        if len(decodes) > 0:
            batch.decodes = decodes
            others = batch.scheduled
            batch.scheduled = [*decodes.scheduled, *others] if others else decodes.scheduled
        assert batch.scheduled, "a step without work"
        return batch

    def schedule_ahead(self, batch: Batch) -> Batch | None:
        """The step behind a batch whose tokens are not known yet, where they cannot change it.

        That is where every running sequence decodes in the batch, nobody waits for a place that is
        free, and blocks suffice. Sequences that reach their length in the batch are left out. One
        that turns out to have ended otherwise is computed in vain: its blocks may be given away at
        once, as whatever the device does for the next owner comes later.

        Args:
            batch: the last one that was scheduled; `update` comes after this.
        """
        if self.waiting and self.num_running < self.max_num_seqs:
            return None
        if batch.decodes is None or not batch.is_decode:
            return None
        ahead = self._rows.schedule_ahead(batch.decodes)
        if ahead is None:
            return None
        return Batch(ahead.scheduled, ahead, ahead_rows=ahead.ahead_rows)

    def update(self, batch: Batch, result: StepResult) -> list[Sequence]:
        """Take in a step's result.

        Returns:
            the sequences that ended, that got their first token or one that somebody looks at.
        """
        for row, entry in result.logprobs.items():
            sequence = batch.scheduled[row].sequence
            if not sequence.is_finished:
                sequence.output_logprobs.append(entry)
                sequence.cumulative_logprob += entry[result.token_ids[row]].logprob
        noticed: list[Sequence] = []
        if batch.decodes is not None:
            for row in self._rows.advance(
                batch.decodes, result.token_ids, self.block_manager.enable_prefix_caching
            ):
                sequence = batch.scheduled[row].sequence
                noticed.append(sequence)
                if row in result.failures:
                    self._fail(sequence, result.failures[row])
                else:
                    self._finish_if_ended(sequence)
        for row in range(batch.num_decodes, len(batch.scheduled)):
            self._update_prefill(batch.scheduled[row], row, result, noticed)
        return noticed

    def _update_prefill(
        self, scheduled: ScheduledSequence, row: int, result: StepResult, noticed: list[Sequence]
    ) -> None:
        sequence = scheduled.sequence
        if sequence.is_finished:
            return
        first = sequence.num_computed_tokens + 1
        sequence.num_computed_tokens += scheduled.num_tokens
        if row in result.prompt_logprobs:
            entries = result.prompt_logprobs[row]
            sequence.prompt_logprobs[first : first + len(entries)] = entries
        if row in result.failures:
            noticed.append(sequence)
            self._fail(sequence, result.failures[row])
            return
        self.block_manager.commit(sequence)
        if scheduled.samples:
            noticed.append(sequence)
            self._start_decoding(sequence, result.token_ids[row])

    def _schedule_decodes(self, batch: Batch) -> tuple[DecodeStep, bool]:
        """Give the sequences that decode a slot for their last token, oldest first.

        Returns:
            those that have one, and whether the pool was too small.
        """
        while True:
            decodes = self._rows.schedule(self.max_num_batched_tokens)
            missing = min(len(self._rows), self.max_num_batched_tokens) - len(decodes)
            if missing == 0:
                return decodes, bool(batch.preempted)
            if len(decodes) == self.num_running - 1:
                # The newest waits with its blocks for an older one to end, or to preempt it.
                return decodes, True
            self._preempt_newest(batch)

    def _admit(self, batch: Batch, budget: int) -> None:
        """Start waiting sequences while there is budget and room."""
        manager = self.block_manager
        while (
            self.waiting
            and budget > 0
            and self.num_running < self.max_num_seqs
            and manager.num_free_blocks > self.num_running
        ):
            sequence = self.waiting[0]
            if not _wants_prompt_logprobs(sequence):
                manager.share_prefix(sequence, self._computed_sibling(sequence))
            whole = sequence.num_tokens - sequence.num_computed_tokens <= budget
            # A spare block for each running sequence, which will soon want one: else the new one
            # would have to leave again.
            if not (whole or self.enable_chunked_prefill) or not manager.can_allocate(
                sequence, reserve=self.num_running
            ):
                manager.free(sequence)
                return
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            manager.allocate(sequence, batch.block_copies)
            self.waiting.popleft()
            self._running[sequence] = None
            sequence.status = SequenceStatus.PREFILL
            budget -= self._put(batch, sequence, budget)

    def _put(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        remaining = sequence.num_tokens - sequence.num_computed_tokens
        num_tokens = min(remaining, budget)
        batch.scheduled.append(ScheduledSequence(sequence, num_tokens, num_tokens == remaining))
        return num_tokens

    def _preempt_newest(self, batch: Batch) -> None:
        sequence = next(reversed(self._running))
        self._stop_running(sequence)
        sequence.status = SequenceStatus.WAITING
        self.block_manager.free(sequence)
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        batch.preempted.append(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[sequence]
        if sequence.status is SequenceStatus.RUNNING:
            self._rows.remove(sequence.decode_row)

    def _start_decoding(self, sequence: Sequence, token_id: int) -> None:
        """Take in the token behind the last one that was known when the sequence was admitted."""
        params = sequence.params
        sequence.token_ids.append(token_id)
        sequence.status = SequenceStatus.RUNNING
        sequence.decode_row = self._rows.add(
            ScheduledSequence(sequence, 1, True),
            sequence.token_ids,
            sequence.block_table,
            sequence.block_hashes,
            self._max_num_tokens(sequence),
            sequence.num_prompt_tokens + params.min_tokens,
            sequence.end_token_ids,
            sequence.is_followed,
        )
        self._release_held(sequence)
        self._finish_if_ended(sequence)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self.block_manager.discard(sequence)
        self.finish(sequence, "abort", reason)

    def _finish_if_ended(self, sequence: Sequence) -> None:
        params, token_id = sequence.params, sequence.token_ids[-1]
        if token_id in sequence.end_token_ids and sequence.num_output_tokens > params.min_tokens:
            by_stop_token = token_id in (params.stop_token_ids or ())
            self.finish(sequence, "stop", token_id if by_stop_token else None)
        elif sequence.num_tokens >= self._max_num_tokens(sequence):
            self.finish(sequence, "length")

    def _max_num_tokens(self, sequence: Sequence) -> int:
        """The sequence ends for its length with so many."""
        max_tokens = sequence.params.max_tokens
        if max_tokens is None:
            return self.max_model_len
        return min(sequence.num_prompt_tokens + max_tokens, self.max_model_len)

    def _release_held(self, sequence: Sequence) -> None:
        """Queue those who waited for this sequence to compute the prompt, next in line."""
        if sequence.index == 0:
            self.waiting.extendleft(reversed(self._held.pop(sequence.request_id, [])))

    def _computed_sibling(self, sequence: Sequence) -> Sequence | None:
        """A sequence of the same request to fork a fresh one from."""
        if sequence.num_output_tokens:
            return None
        for sibling in self._requests[sequence.request_id]:
            if sibling.num_computed_tokens >= sequence.num_prompt_tokens:
                return sibling
        return None


def _wants_prompt_logprobs(sequence: Sequence) -> bool:
    """Whether the whole prompt must be computed, for logits that the cache does not hold."""
    return (
        sequence.params.prompt_logprobs is not None
        and len(sequence.prompt_logprobs) < sequence.num_prompt_tokens
    )
