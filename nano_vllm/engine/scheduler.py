"""Picks what the next step computes, and takes in what came of it."""

from __future__ import annotations

from nano_vllm._core import DecodeStep
from nano_vllm.batch import Batch, ScheduledSequence, StepResult
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.cache.ledger import Leak
from nano_vllm.engine.admission import ADMISSION_HORIZON, Admission
from nano_vllm.engine.beam_group import BeamGroup
from nano_vllm.engine.beam_searches import BeamSearches
from nano_vllm.engine.prefill_pace import PrefillBudget, PrefillPace
from nano_vllm.engine.running_sequences import RunningSequences
from nano_vllm.engine.waiting_queue import WaitingQueue
from nano_vllm.sequence import Sequence, SequenceStatus


class Scheduler:
    """Continuous batching: every step is filled anew, up to a budget of tokens.

    Running sequences come first, in the order of their admission, then waiting ones, first come
    first served or by priority. A prompt longer than what is left of the budget is computed in
    chunks over several steps, if allowed. Beside sequences that are streamed, the budget of prompts
    is what the pace of these allows. When the pool is dry, the newest running sequence of the
    lowest priority loses its blocks and goes back to its place in the queue with the tokens it has
    generated; they are found in the prefix cache, or computed again as part of its prompt. The
    completions of one request wait for the first of them to compute the prompt, then fork from it.

    Pure: no clock, no randomness, no device. Every step that has work computes at least one token
    of the running sequence that comes first, so every sequence ends.

    A step may be scheduled behind one that is still computed. So prompts count as computed as far
    as they are scheduled.

    Where to read on: WaitingQueue, who is next; Admission, whether there is room; RunningSequences,
    who has blocks; PrefillBudget, how much of prompts a step holds; BeamSearches, what follows a
    step of beams.

    Invariant between steps: waiting sequences hold no blocks.

    Args:
        block_manager: where blocks come from.
        max_num_seqs: sequences that run at the same time.
        max_num_batched_tokens: tokens of a step.
        max_model_len: tokens of a sequence, prompt and output together.
        enable_chunked_prefill: whether a prompt may be split over steps.
        by_priority: whether priorities count.
        prefill_pace: how many tokens of prompts go into a step beside sequences that are streamed;
            None for as many as into any.
        host_block_seconds: what copying a block back from host memory takes; None for nothing.
        admission_horizon: steps for which those that run are to have blocks when another is
            admitted.
        num_stages: of a pipeline: as many steps may be under way at the same time, each with other
            sequences, and are taken in in the order in which they were scheduled.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_chunked_prefill: bool = True,
        by_priority: bool = False,
        prefill_pace: PrefillPace | None = None,
        host_block_seconds: float | None = None,
        admission_horizon: int = ADMISSION_HORIZON,
        num_stages: int = 1,
    ) -> None:
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"without chunked prefill max_num_batched_tokens must be at least max_model_len = "
                f"{max_model_len}, got {max_num_batched_tokens}"
            )
        self.block_manager = block_manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_chunked_prefill = enable_chunked_prefill
        self.by_priority = by_priority
        self.prefill_pace = prefill_pace
        self.num_stages = num_stages
        self.waiting = WaitingQueue(by_priority)
        self._running = RunningSequences(block_manager, max_num_seqs)
        self.admission = Admission(
            block_manager,
            self._running,
            enable_chunked_prefill,
            admission_horizon,
            None if prefill_pace is None else prefill_pace.cost,
            host_block_seconds,
        )
        self._prefill_budget = PrefillBudget(
            max_num_batched_tokens, prefill_pace, self._running, block_manager
        )
        self._beams = BeamSearches(self._running, self.waiting, block_manager)
        self._requests: dict[str, list[Sequence]] = {}
        """Sequences of each unfinished request, by index."""
        self._held: dict[str, list[Sequence]] = {}
        """Sequences that wait for the first of their request to compute the prompt."""
        self._num_arrivals = 0
        self._under_way: list[Batch] = []
        """Of a pipeline: steps that are not taken in yet."""

    @property
    def max_num_seqs(self) -> int:
        return self._running.max_num_seqs

    @property
    def admission_horizon(self) -> int:
        return self.admission.horizon

    @property
    def host_block_seconds(self) -> float | None:
        return self.admission.host_block_seconds

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

    def add(self, sequences: list[Sequence], beams: BeamGroup | None = None) -> None:
        """Queue the sequences of one request, of which the first alone may ask for prompt_logprobs.

        Raises ValueError, and queues nothing, where one of them could outgrow the whole pool.

        Args:
            sequences: by index.
            beams: where they are the beams of a search.
        """
        first = sequences[0]
        self.check_fits(first.num_prompt_tokens, first.params.max_tokens)
        if first.params.prompt_logprobs is not None:
            first.prompt_logprobs = [None]  # nothing predicts the first token
        self._num_arrivals += 1
        for sequence in sequences:
            sequence.arrival = self._num_arrivals
            sequence.max_num_tokens = self._longest(
                sequence.num_prompt_tokens, sequence.params.max_tokens
            )
        self._requests[first.request_id] = sequences
        self.waiting.push(first)
        if beams is not None:
            self._beams.add(first.request_id, beams)
        elif len(sequences) > 1:
            self._held[first.request_id] = sequences[1:]

    def check_fits(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Raise ValueError for a sequence that the pool could not hold even if it were empty."""
        longest = self._longest(num_prompt_tokens, max_tokens)
        manager = self.block_manager
        if manager.num_blocks_for(longest) > manager.num_blocks:
            raise ValueError(
                f"{num_prompt_tokens} prompt tokens and max_tokens = {max_tokens} need room for "
                f"{longest} tokens, but the KV cache holds {manager.num_blocks} blocks of "
                f"{manager.block_size} = {manager.num_blocks * manager.block_size} tokens"
            )

    def abort(self, request_id: str) -> list[Sequence]:
        """End what is unfinished of a request, and return it; unknown requests have nothing."""
        unfinished = [s for s in self._requests.get(request_id, ()) if not s.is_finished]
        for sequence in unfinished:
            self.finish(sequence, "abort")
        return unfinished

    def finish(
        self, sequence: Sequence, finish_reason: str, stop_reason: int | str | None = None
    ) -> None:
        """End a sequence and free its blocks; the next step gives its place away."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = finish_reason
        sequence.stop_reason = stop_reason
        self.block_manager.free(sequence)
        self._release_held(sequence)
        if all(s.is_finished for s in self._requests[sequence.request_id]):
            del self._requests[sequence.request_id]
            self._beams.forget(sequence.request_id)

    def schedule(self) -> Batch | None:
        """The next step; None if nothing is left to do, or a step under way must be taken in
        first.
        """
        if not self.has_work or len(self._under_way) >= self.num_stages:
            return None
        batch = Batch([])
        self._fill(batch)
        while not batch.scheduled and not batch.num_decodes:
            if self._under_way:
                return None
            # All that run are beams that wait for one which has no room.
            self._preempt(self._last_to_come(), batch)
            self._fill(batch)
        if self.num_stages > 1:
            self._under_way.append(batch)
        return self._complete(batch)

    def schedule_ahead(self, batch: Batch) -> Batch | None:
        """The step behind a batch whose tokens are not known yet, where they cannot change it.

        That is where no beams are searched for, every row takes part in the batch, and blocks
        suffice. Sequences that reach their length in the batch are left out. One that turns out to
        have ended otherwise is computed in vain: its blocks may be given away at once, as whatever
        the device does for the next owner comes later.

        Args:
            batch: the last one that was scheduled; `update` comes after this.
        """
        if self._beams or batch.decodes is None:
            return None
        ahead = self._running.rows.schedule_ahead(batch.decodes, self.max_num_batched_tokens)
        if ahead is None:
            return None
        behind = Batch([], ahead, ahead_rows=ahead.ahead_rows)
        self._schedule_prompts(behind, [], False)
        return self._complete(behind)

    def retract(self, batch: Batch) -> None:
        """Undo a step that failed: it may have computed all it should have, or nothing.

        The sequences that decode take the step again. The others go back to the queue, and nobody
        finds what they were to compute. A step that was scheduled behind it is to be undone first.
        """
        self._take_from_way(batch)
        self.block_manager.forget_written(batch)
        for scheduled in batch.scheduled[batch.num_decodes :]:
            sequence = scheduled.sequence
            if sequence in self._running.prefilling or sequence in self._running.joining:
                self.block_manager.free(sequence)  # first: it is not to count as computed
                self._requeue(sequence)

    def observe(self, batch: Batch, seconds: float) -> None:
        """Tell the pace of the prompts how long a step took; before `update`.

        Args:
            batch: the step.
            seconds: from the result of the step before to its own.
        """
        self._prefill_budget.observe(batch, seconds)

    def update(self, batch: Batch, result: StepResult) -> list[Sequence]:
        """Take in a step's result.

        Returns:
            the sequences that ended, that got their first token or one that somebody looks at.
        """
        self._take_from_way(batch)
        for row, entry in result.logprobs.items():
            sequence = batch.scheduled[row].sequence
            if not sequence.is_finished and sequence not in self._beams:
                sequence.output_logprobs.append(entry)
                sequence.cumulative_logprob += entry[result.token_ids[row]].logprob
        noticed: list[Sequence] = []
        if batch.decodes is not None:
            for row in self._running.rows.advance(
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

    def pin(self, token_ids: list[int], cache_root: bytes) -> int:
        """Keep the full blocks that hold these tokens, as far as they are computed, from eviction.

        Returns:
            a number for `unpin`. ValueError where a sequence of max_model_len would not fit beside
            what is pinned.
        """
        manager = self.block_manager
        return manager.pin(token_ids, cache_root, manager.num_blocks_for(self.max_model_len))

    def unpin(self, pin: int) -> None:
        """Leave a pin's blocks to eviction again."""
        self.block_manager.unpin(pin)

    def searches(self, sequence: Sequence) -> bool:
        """Whether it is a beam."""
        return sequence in self._beams

    def reclaim_leaks(self) -> list[Leak]:
        """Take back references to blocks that no sequence and no pin has any more. There are none
        to be; that there are none takes constant time.
        """
        manager = self.block_manager
        if manager.is_balanced(self._running.num_table_blocks):
            return []
        return manager.reclaim(self._running)

    def _update_prefill(
        self, scheduled: ScheduledSequence, row: int, result: StepResult, noticed: list[Sequence]
    ) -> None:
        sequence = scheduled.sequence
        if sequence.is_finished:
            return
        if row in result.prompt_logprobs:
            first = scheduled.start + 1
            entries = result.prompt_logprobs[row]
            sequence.prompt_logprobs[first : first + len(entries)] = entries
        if sequence in self._beams:
            if scheduled.samples:
                self._update_beam(sequence, row, result, noticed)
        elif row in result.failures:
            noticed.append(sequence)
            self._fail(sequence, result.failures[row])
        elif scheduled.samples:
            noticed.append(sequence)
            self._running.take_first(sequence, result.token_ids[row])
            self._release_held(sequence)
            self._finish_if_ended(sequence)

    def _fill(self, batch: Batch) -> None:
        """Put in what decodes, then prompts."""
        batch.decodes, beams, dry = self._schedule_decodes(batch)
        for beam in beams:
            self.block_manager.free_behind_window(beam)
            self.block_manager.allocate(beam, batch)
            self._put(batch, beam, 1)
        self._schedule_prompts(batch, beams, dry)

    def _schedule_prompts(self, batch: Batch, beams: list[Sequence], dry: bool) -> None:
        """Put in what prefills and what waits, whichever comes first.

        Args:
            batch: has its decodes, and the beams.
            beams: of the batch.
            dry: whether the pool is too small for what runs.
        """
        order, is_grown = self.waiting.order, self._beams.is_grown
        prefilling = sorted(
            (s for s in self._running.prefilling if s.num_uncomputed_tokens and not is_grown(s)),
            key=order,
        )
        if not prefilling and not self.waiting:
            return
        num_decodes = batch.num_decodes + len(beams)
        budget = self._prefill_budget.tokens(num_decodes, prefilling[0] if prefilling else None)
        while budget > 0:
            head = None if dry else self.waiting.head
            if prefilling and (head is None or order(prefilling[0]) < order(head)):
                # Not as it is admitted: what is loaded from host memory comes with this step.
                self.block_manager.free_behind_window(prefilling[0])
                budget -= self._put(batch, prefilling.pop(0), budget)
            elif head is not None and self._admit(head, batch, budget):
                if head.num_computed_tokens and len(batch.scheduled) == len(beams):
                    budget = self._prefill_budget.tokens(num_decodes, head)
                budget -= self._put(batch, head, budget)
            elif head is not None:
                dry = True  # nobody overtakes it
            else:
                return

    def _complete(self, batch: Batch) -> Batch | None:
        """With the rows of its decodes ahead of the others; None if there is nothing in it."""
        assert batch.decodes is not None
        rows, others = batch.decodes.scheduled, batch.scheduled
        if batch.num_decodes:
            batch.scheduled = [*rows, *others] if others else rows
        self.block_manager.take_evictions(batch)
        return batch if batch.scheduled else None

    def _schedule_decodes(self, batch: Batch) -> tuple[DecodeStep, list[Sequence], bool]:
        """Give the sequences that decode a slot for their last token, oldest first.

        Returns:
            the rows and the beams that have one, and whether the pool was too small.
        """
        manager = self.block_manager
        share = -(-len(self._running.rows) // self.num_stages)
        limit = min(share, self.max_num_batched_tokens)
        steps = [batch.decodes for batch in self._under_way if batch.decodes is not None]
        dry = False
        while True:
            decodes = self._running.rows.schedule(limit, steps)
            missing = decodes.num_missing
            room = self.max_num_batched_tokens - len(decodes)
            beams = self._beams.grown(room)
            has_room = manager.num_missing_blocks(beams) <= manager.num_free_blocks
            if has_room and not missing:
                return decodes, beams, dry
            if self._under_way:
                return decodes, [], True  # those under way hold blocks, and cannot be preempted
            last = self._last_to_come()
            newest = max(s.decode_row for s in self._running)
            is_without = missing == 1 and limit >= len(self._running.rows)
            if has_room and is_without and last.decode_row == newest:
                # The one without a slot waits with its blocks for another to end, or to preempt it.
                return decodes, beams, True
            self._preempt(last, batch)
            dry = True

    def _admit(self, head: Sequence, batch: Batch, budget: int) -> bool:
        """Start the head of the queue, if there is room."""
        siblings = self._requests[head.request_id]
        if not self.admission.admit(head, siblings, batch, budget):
            return False
        self.waiting.pop()
        self._running.start(head)
        return True

    def _put(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        remaining = sequence.num_uncomputed_tokens
        num_tokens, start = min(remaining, budget), sequence.num_computed_tokens
        samples = num_tokens == remaining
        batch.scheduled.append(
            ScheduledSequence(sequence, num_tokens, samples, start, sequence.block_table)
        )
        sequence.num_computed_tokens = start + num_tokens
        self.block_manager.commit(sequence, start + num_tokens)
        if samples and sequence not in self._beams:
            self._running.join(sequence, batch)
        return num_tokens

    def _take_from_way(self, batch: Batch) -> None:
        self._under_way = [other for other in self._under_way if other is not batch]

    def _last_to_come(self) -> Sequence:
        """The running sequence that has to go first."""
        return max(self._running, key=self.waiting.order)

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        self.admission.note_preemption(sequence)
        batch.preempted.append(sequence)
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue, without its blocks."""
        is_waiting_for_others = sequence.num_uncomputed_tokens == 0
        self._running.remove(sequence)
        self.block_manager.free(sequence)
        if not is_waiting_for_others:
            self.waiting.push(sequence)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self.block_manager.distrust(sequence)
        self.finish(sequence, "abort", reason)

    def _finish_if_ended(self, sequence: Sequence) -> None:
        params, token_id = sequence.params, sequence.token_ids[-1]
        if token_id in sequence.end_token_ids and sequence.num_output_tokens > params.min_tokens:
            by_stop_token = token_id in (params.stop_token_ids or ())
            self.finish(sequence, "stop", token_id if by_stop_token else None)
        elif sequence.num_tokens >= sequence.max_num_tokens:
            self.finish(sequence, "length")

    def _longest(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Tokens with which a sequence ends for its length."""
        if max_tokens is None:
            return self.max_model_len
        return min(num_prompt_tokens + max_tokens, self.max_model_len)

    def _release_held(self, sequence: Sequence) -> None:
        """Queue those who waited for this sequence to compute the prompt, next in line."""
        if sequence.index == 0:
            for sibling in self._held.pop(sequence.request_id, ()):
                self.waiting.push(sibling)

    def _update_beam(
        self, sequence: Sequence, row: int, result: StepResult, noticed: list[Sequence]
    ) -> None:
        """Take in what may follow a beam, and the search's end where there is nothing to follow."""
        candidates = []
        if row in result.failures:
            self.block_manager.distrust(sequence)
        else:
            candidates = [(token, entry.logprob) for token, entry in result.logprobs[row].items()]
        if self._beams.take(sequence, candidates):
            noticed += self._requests[sequence.request_id]
            for each, finish_reason, stop_reason in self._beams.ends(sequence.request_id):
                self.finish(each, finish_reason, stop_reason)
