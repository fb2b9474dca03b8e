"""Who is scheduled when, and who has to go."""

from __future__ import annotations

import pytest

from nano_vllm.batch import Batch, StepResult, StepWork
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.engine.beam_group import BeamGroup
from nano_vllm.engine.prefill_pace import PrefillPace
from nano_vllm.engine.scheduler import Scheduler
from nano_vllm.logprob import Logprob
from nano_vllm.sampling.beam_search import BeamSearch
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence, SequenceStatus

BLOCK_SIZE = 8


def make_scheduler(num_blocks: int = 64, **options: int) -> Scheduler:
    settings = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "admission_horizon": BLOCK_SIZE,
    }
    return Scheduler(BlockManager(num_blocks, BLOCK_SIZE), **(settings | options))


def add(scheduler: Scheduler, name: str, num_tokens: int, **params: object) -> Sequence:
    n = int(params.pop("n", 1))  # type: ignore[call-overload]
    settings = SamplingParams(**{"max_tokens": 100, **params})
    prompt = [ord(name)] * num_tokens
    sequences = [Sequence(index, name, index, prompt, settings) for index in range(n)]
    scheduler.add(sequences)
    return sequences[0]


def rows(batch: Batch) -> list[tuple[str, int]]:
    return [(s.sequence.request_id, s.num_tokens) for s in batch.scheduled]


def step(scheduler: Scheduler, token_id: int = 1) -> list[tuple[str, int]]:
    """One step that gives everybody the same token."""
    batch = scheduler.schedule()
    assert batch is not None
    sampled = [token_id if s.samples else -1 for s in batch.scheduled]
    scheduler.update(batch, StepResult(sampled))
    scheduler.block_manager.allocator.check_integrity()
    return rows(batch)


def test_life_of_a_sequence() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    sequence = add(scheduler, "a", 15, max_tokens=2)
    assert sequence.status is SequenceStatus.WAITING
    assert step(scheduler) == [("a", 10)]
    assert sequence.status is SequenceStatus.PREFILL
    assert sequence.num_output_tokens == 0
    assert step(scheduler) == [("a", 5)]
    assert sequence.status is SequenceStatus.RUNNING
    assert step(scheduler) == [("a", 1)]
    assert sequence.status is SequenceStatus.FINISHED
    assert (sequence.finish_reason, sequence.output_token_ids) == ("length", [1, 1])
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_decodes_come_first_then_the_chunk_then_waiting_ones_in_order() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    add(scheduler, "a", 5)
    add(scheduler, "b", 30)
    add(scheduler, "c", 9)
    add(scheduler, "d", 9)
    assert step(scheduler) == [("a", 5), ("b", 15)]
    assert step(scheduler) == [("a", 1), ("b", 15), ("c", 4)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 5), ("d", 9)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1), ("d", 1)]


def decode_and_ahead(scheduler: Scheduler) -> tuple[Batch, Batch | None]:
    """A step whose tokens are not known yet, and the one behind it."""
    batch = scheduler.schedule()
    assert batch is not None
    return batch, scheduler.schedule_ahead(batch)


def test_a_step_ahead_goes_on_with_those_that_do_not_end() -> None:
    scheduler = make_scheduler()
    for name, max_tokens in (("a", 9), ("b", 2), ("c", 9)):
        add(scheduler, name, 7, max_tokens=max_tokens)
    step(scheduler)
    batch, ahead = decode_and_ahead(scheduler)
    assert rows(batch) == [("a", 1), ("b", 1), ("c", 1)]
    assert ahead is not None
    assert rows(ahead) == [("a", 1), ("c", 1)]
    assert ahead.ahead_rows == [0, 2]
    assert [len(s.sequence.block_table) for s in ahead.scheduled] == [2, 2]
    scheduler.update(batch, StepResult([1] * 3))
    scheduler.finish(scheduler.running[0], "stop")
    scheduler.update(ahead, StepResult([1] * 2))
    assert [s.request_id for s in scheduler.running] == ["c"]
    assert scheduler.running[0].num_output_tokens == 3
    further = scheduler.schedule_ahead(ahead)
    assert further is not None
    assert (rows(further), further.ahead_rows) == ([("c", 1)], [1])


def test_a_step_ahead_admits_and_goes_on_with_prompts() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10, max_num_seqs=3)
    add(scheduler, "a", 7)
    add(scheduler, "b", 12)
    batch, ahead = decode_and_ahead(scheduler)
    assert rows(batch) == [("a", 7), ("b", 3)]
    assert ahead is not None
    assert (rows(ahead), ahead.ahead_rows) == ([("a", 1), ("b", 9)], [0])
    assert [batch.start(0), batch.start(1), ahead.start(0), ahead.start(1)] == [0, 0, 7, 3]
    add(scheduler, "c", 7)
    scheduler.update(batch, StepResult([1, -1]))
    batch, ahead = ahead, scheduler.schedule_ahead(ahead)
    assert ahead is not None
    assert (rows(ahead), ahead.ahead_rows) == ([("a", 1), ("b", 1), ("c", 7)], [0, 1])
    assert [ahead.start(row) for row in range(3)] == [8, 12, 0]
    add(scheduler, "d", 7)  # for whom there is no place
    scheduler.update(batch, StepResult([1, 5]))
    assert [s.output_token_ids for s in scheduler.running] == [[1, 1], [5], []]
    batch, ahead = ahead, scheduler.schedule_ahead(ahead)
    assert ahead is not None
    assert (rows(ahead), ahead.ahead_rows) == ([("a", 1), ("b", 1), ("c", 1)], [0, 1, 2])


def test_steps_that_fail_take_their_prompts_back() -> None:
    """Chunks of both steps, and a row that the first of them was to begin."""
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "a", 7, max_tokens=3)
    add(scheduler, "b", 20)
    batch, ahead = decode_and_ahead(scheduler)
    assert ahead is not None
    assert rows(ahead) == [("a", 1), ("b", 9)]
    scheduler.retract(ahead)
    scheduler.retract(batch)
    assert scheduler.num_running == 0
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    assert step(scheduler) == [("a", 7), ("b", 3)]
    assert step(scheduler) == [("a", 1), ("b", 9)]
    assert scheduler.running[0].output_token_ids == [1, 1]


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("is_aborted", [True, False])
def test_nobody_finds_what_steps_that_failed_were_to_compute(window: int, is_aborted: bool) -> None:
    """Neither by a request that is gone, nor in blocks that were given back behind the window."""
    scheduler = Scheduler(BlockManager(64, BLOCK_SIZE, sliding_window=window), 8, 16, 64)
    add(scheduler, "a", 40)
    step(scheduler)
    batch, ahead = decode_and_ahead(scheduler)
    assert ahead is not None
    assert rows(batch) + rows(ahead) == [("a", 16), ("a", 8)]
    if is_aborted:
        scheduler.abort("a")
    scheduler.retract(ahead)
    scheduler.retract(batch)
    scheduler.abort("a")
    assert scheduler.block_manager.num_free_blocks == 64
    again = add(scheduler, "a", 40)
    assert step(scheduler) == [("a", 16)]
    assert again.num_cached_tokens == 16  # of the step that was taken in


def test_nobody_finds_what_a_step_that_failed_was_to_load() -> None:
    scheduler = Scheduler(BlockManager(4, BLOCK_SIZE, num_host_blocks=8), 8, 64, 32)
    for name in "ab":
        add(scheduler, name, 24, max_tokens=1)
        step(scheduler)
    for _ in range(2):
        again = add(scheduler, "a", 24, max_tokens=1)
        batch = scheduler.schedule()
        assert batch is not None
        assert again.num_cached_tokens == 16
        assert len(batch.swap_ins) == 1, "what the step before was to copy was found"
        scheduler.abort("a")
        scheduler.retract(batch)


def test_who_ends_with_the_first_token_is_in_no_step_ahead() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 7, max_tokens=1)
    _, ahead = decode_and_ahead(scheduler)
    assert ahead is None


def test_no_step_ahead_of_beams() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 7)
    search = BeamSearch(BeamSearchParams(beam_width=1, max_tokens=4), frozenset(), 4)
    sequence = Sequence(9, "b", 0, [1] * 5, SamplingParams(max_tokens=4, logprobs=2))
    scheduler.add([sequence], BeamGroup(search, [sequence]))
    _, ahead = decode_and_ahead(scheduler)
    assert ahead is None


def test_no_step_ahead_without_blocks() -> None:
    scheduler = make_scheduler(num_blocks=3, max_model_len=16)
    for name in "ab":
        add(scheduler, name, 6, max_tokens=5)
    step(scheduler)
    batch, ahead = decode_and_ahead(scheduler)
    assert ahead is not None  # each has a slot left
    scheduler.update(batch, StepResult([1] * 2))
    assert scheduler.schedule_ahead(ahead) is None  # two blocks, where one is free
    assert scheduler.block_manager.num_free_blocks == 1
    assert [len(s.block_table) for s in scheduler.running] == [1, 1]


def test_a_finished_sequence_is_replaced_in_the_very_next_step() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add(scheduler, "a", 4, max_tokens=2)
    add(scheduler, "b", 4)
    add(scheduler, "c", 4)
    assert step(scheduler) == [("a", 4), ("b", 4)]
    assert step(scheduler) == [("a", 1), ("b", 1)]
    assert step(scheduler) == [("b", 1), ("c", 4)]


def test_prompts_are_scheduled_whole_without_chunked_prefill() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, enable_chunked_prefill=False)
    add(scheduler, "a", 40)
    add(scheduler, "b", 30)
    add(scheduler, "c", 4)
    assert step(scheduler) == [("a", 40)]
    assert step(scheduler) == [("a", 1), ("b", 30), ("c", 4)]


def test_too_small_a_budget_without_chunked_prefill_is_refused() -> None:
    with pytest.raises(ValueError, match="at least max_model_len = 64, got 63"):
        make_scheduler(max_num_batched_tokens=63, enable_chunked_prefill=False)


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=8)
    a, b, c = (add(scheduler, name, 14) for name in "abc")
    d = add(scheduler, "d", 1)
    # Two blocks each; one for each that runs, which will soon want it, is left at admission.
    assert step(scheduler) == [("a", 14), ("b", 14), ("c", 14)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1)]
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1)]
    # Each needs a third block and two are free.
    assert step(scheduler) == [("a", 1), ("b", 1)]
    assert [s.num_preemptions for s in (a, b, c, d)] == [0, 0, 0, 0]
    assert c.status is SequenceStatus.RUNNING
    while not c.num_preemptions:
        step(scheduler)
    assert (c.block_table, c.num_computed_tokens, c.status) == ([], 0, SequenceStatus.WAITING)
    assert [s.request_id for s in scheduler.waiting] == ["c", "d"]
    assert [s.num_preemptions for s in (a, b, d)] == [0, 0, 0]
    kept = list(c.token_ids)
    scheduler.abort("a")
    # What it computed before is found again, as far as it was not overwritten.
    batch = scheduler.schedule()
    assert batch is not None
    assert [s.request_id for s in scheduler.running] == ["b", "c"]
    again = batch.scheduled[1]
    assert again.sequence is c
    assert again.samples
    assert again.start + again.num_tokens == len(kept)
    assert c.token_ids == kept


def test_preempted_sequences_keep_their_order() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for name in "abc":
        add(scheduler, name, 7)
    step(scheduler)
    while len(scheduler.running) > 1:
        step(scheduler)
    assert [s.request_id for s in scheduler.waiting] == ["b", "c"]


def test_a_sequence_without_room_waits_with_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=8)
    add(scheduler, "a", 38)
    b = add(scheduler, "b", 16)
    assert step(scheduler) == [("a", 38), ("b", 16)]
    scheduler.block_manager.allocator.allocate()
    # The pool is dry, and nobody is newer than b.
    assert step(scheduler) == [("a", 1)]
    assert (b.status, b.num_preemptions) == (SequenceStatus.RUNNING, 0)
    scheduler.abort("a")
    assert step(scheduler) == [("b", 1)]


def test_who_makes_room_is_not_back_in_the_same_step() -> None:
    """Steps of a pipeline hold a part of the rows: the one without a slot is not the newest."""
    scheduler = make_scheduler(
        num_blocks=5, max_model_len=40, num_stages=2, admission_horizon=0, max_num_seqs=2
    )
    first, other = (Sequence(i, str(i), 0, [7] * 15, SamplingParams(max_tokens=20)) for i in (0, 1))
    scheduler.add([first])
    scheduler.add([other])
    step(scheduler)
    while first.num_tokens < 25:
        batches = [scheduler.schedule(), scheduler.schedule()]
        for batch in batches:
            assert batch is not None
            scheduler.update(batch, StepResult([1]))
    assert scheduler.block_manager.num_free_blocks == 0
    batch = scheduler.schedule()
    assert batch is not None
    assert (batch.preempted, rows(batch)) == ([other], [("0", 1)])
    # All that it had is found, as the first has the same.
    behind = scheduler.schedule()
    assert behind is not None
    assert rows(behind) == [("1", 1)]
    assert other.num_preemptions == 1


@pytest.mark.parametrize("has_company", [True, False])
def test_a_beam_goes_on_beside_a_row_that_waits_for_a_slot(has_company: bool) -> None:
    scheduler = make_scheduler(num_blocks=4 + has_company, max_model_len=32, admission_horizon=0)
    search = BeamSearch(BeamSearchParams(beam_width=1, max_tokens=7), frozenset(), 7)
    beam = Sequence(0, "beam", 0, [5] * 9, SamplingParams(max_tokens=7, logprobs=2))
    scheduler.add([beam], BeamGroup(search, [beam]))
    if has_company:
        add(scheduler, "a", 1, max_tokens=7)
    row = add(scheduler, "b", 15, max_tokens=9)
    while not beam.is_finished:
        batch = scheduler.schedule()
        assert batch is not None
        known = {s.sequence.request_id: place for place, s in enumerate(batch.scheduled)}
        likely = {1: Logprob(-1.0), 2: Logprob(-2.0)}
        scheduler.update(batch, StepResult([1] * len(known), logprobs={known["beam"]: likely}))
    assert beam.num_output_tokens == 7
    assert (row.num_output_tokens, row.num_preemptions) == (2, 0)
    while scheduler.has_work:
        step(scheduler)
    assert row.num_output_tokens == 9


def test_nobody_is_admitted_after_a_preemption() -> None:
    scheduler = make_scheduler(num_blocks=8)
    for name in "abc":
        add(scheduler, name, 15)
    add(scheduler, "d", 1)
    while True:
        batch = scheduler.schedule()
        assert batch is not None
        if batch.preempted:
            break
        tokens = [1 for _ in batch.scheduled]
        scheduler.update(batch, StepResult(tokens))
    assert all(s.num_tokens == 1 for s in batch.scheduled)
    assert "d" not in dict(rows(batch))


@pytest.mark.parametrize("num_prompt_tokens", [3, 9, 20, 22])
def test_a_pool_runs_as_many_sequences_as_it_holds(num_prompt_tokens: int) -> None:
    """Each of 24 tokens at its end, which are three blocks: none is kept for anything else."""
    scheduler = make_scheduler(
        num_blocks=30, max_num_batched_tokens=300, max_num_seqs=16, admission_horizon=64
    )
    max_tokens = 24 - num_prompt_tokens
    sequences = [add(scheduler, c, num_prompt_tokens, max_tokens=max_tokens) for c in "abcdefghijk"]
    step(scheduler)
    assert scheduler.num_running == 10
    while scheduler.has_work:
        step(scheduler)
    assert not any(sequence.num_preemptions for sequence in sequences)


def test_what_can_never_fit_is_refused_at_the_door() -> None:
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(
        ValueError, match=r"30 prompt tokens.*room for 33 tokens.*4 blocks of 8 = 32 tokens"
    ):
        add(scheduler, "a", 30, max_tokens=3)
    assert not scheduler.has_work
    add(scheduler, "b", 30, max_tokens=2)
    while scheduler.has_work:
        step(scheduler)


def test_stop_tokens_count_from_min_tokens_on() -> None:
    scheduler = make_scheduler()
    sequence = Sequence(0, "a", 0, [5], SamplingParams(max_tokens=9, min_tokens=2), frozenset({1}))
    scheduler.add([sequence])
    while scheduler.has_work:
        step(scheduler, token_id=1)
    assert sequence.output_token_ids == [1, 1, 1]
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", None)


def test_a_stop_token_is_the_reason() -> None:
    scheduler = make_scheduler()
    params = SamplingParams(max_tokens=9, stop_token_ids=[7])
    sequence = Sequence(0, "a", 0, [5], params, frozenset({1, 7}))
    scheduler.add([sequence])
    step(scheduler, token_id=7)
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", 7)


def test_the_context_ends_a_sequence() -> None:
    scheduler = make_scheduler(max_model_len=12)
    sequence = add(scheduler, "a", 10, max_tokens=None)
    while scheduler.has_work:
        step(scheduler)
    assert (sequence.num_tokens, sequence.finish_reason) == (12, "length")


def test_completions_fork_from_the_first() -> None:
    scheduler = make_scheduler(num_blocks=64)
    add(scheduler, "a", 20, n=3)
    add(scheduler, "b", 4)
    assert step(scheduler) == [("a", 20), ("b", 4)]
    batch = scheduler.schedule()
    assert batch is not None
    assert rows(batch) == [("a", 1), ("b", 1), ("a", 1), ("a", 1)]
    leader, forks = batch.scheduled[0].sequence, [s.sequence for s in batch.scheduled[2:]]
    for fork in forks:
        assert fork.num_computed_tokens == 19
        # Two full blocks shared, the third one copied before it is written into
        assert fork.block_table[:2] == leader.block_table[:2]
        assert (leader.block_table[2], fork.block_table[2]) in batch.block_copies
    assert len({s.block_table[2] for s in [leader, *forks]}) == 3


@pytest.mark.parametrize("end", ["abort", "failure"])
def test_the_others_of_a_request_do_not_wait_for_a_first_one_that_is_gone(end: str) -> None:
    scheduler = make_scheduler()
    first = add(scheduler, "a", 20, n=2)
    if end == "abort":
        assert len(scheduler.abort("a")) == 2
    else:
        batch = scheduler.schedule()
        assert batch is not None
        assert scheduler.update(batch, StepResult([-1], {0: "broken"})) == [first]
        assert (first.finish_reason, first.stop_reason) == ("abort", "broken")
        assert step(scheduler) == [("a", 20)]
        scheduler.abort("a")
    assert not scheduler.has_work
    assert scheduler.num_waiting == 0
    assert scheduler.block_manager.allocator.num_active == 0


def test_blocks_of_a_failed_sequence_are_not_found_again() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    add(scheduler, "a", 20)
    step(scheduler)
    assert scheduler.block_manager.allocator.num_active == 3
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(batch, StepResult([-1], {0: "broken"}))
    assert scheduler.block_manager.allocator.num_cached == 0
    add(scheduler, "a", 20)
    assert step(scheduler) == [("a", 16)]


@pytest.mark.parametrize("num_steps", [0, 1])
def test_blocks_of_a_failed_beam_are_not_found_again(num_steps: int) -> None:
    scheduler = make_scheduler()
    search = BeamSearch(BeamSearchParams(beam_width=1, max_tokens=9), frozenset(), 9)
    beam = Sequence(0, "a", 0, [ord("a")] * 20, SamplingParams(max_tokens=9, logprobs=2))
    scheduler.add([beam], BeamGroup(search, [beam]))
    likely = {0: {1: Logprob(-1.0), 2: Logprob(-2.0)}}
    for result in [StepResult([1], logprobs=likely)] * num_steps + [StepResult([-1], {0: "bad"})]:
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, result)
    assert (beam.finish_reason, beam.stop_reason) == ("abort", "no beam is left")
    assert scheduler.block_manager.allocator.num_cached == 0
    add(scheduler, "a", 20)
    assert step(scheduler) == [("a", 20)]


def test_prompt_logprobs_need_the_whole_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    add(scheduler, "a", 20, max_tokens=1)
    step(scheduler)
    step(scheduler)
    sequence = Sequence(1, "b", 0, [ord("a")] * 20, SamplingParams(prompt_logprobs=0))
    scheduler.add([sequence])
    entries = [{ord("a"): Logprob(-float(place), 1)} for place in range(1, 20)]
    # Each token but the last predicts another one of the prompt.
    for num_tokens, first, last in ((12, 0, 12), (8, 12, 19)):
        batch = scheduler.schedule()
        assert batch is not None
        assert rows(batch) == [("b", num_tokens)]
        token = 1 if batch.scheduled[0].samples else -1
        scheduler.update(batch, StepResult([token], prompt_logprobs={0: entries[first:last]}))
    assert sequence.prompt_logprobs == [None, *entries]


def test_what_host_memory_has_is_loaded_where_computing_it_takes_longer() -> None:
    pace = PrefillPace()
    for count in range(200):  # 1 ms, and 10 us a token
        tokens = 8 * (count % 20)
        pace.observe(StepWork(0, 0, tokens, 0), 1e-3 + 1e-5 * tokens)
    for block_seconds, num_cached in ((70e-6, 16), (90e-6, 0)):
        scheduler = Scheduler(
            BlockManager(8, BLOCK_SIZE, num_host_blocks=8),
            8,
            64,
            64,
            prefill_pace=pace,
            host_block_seconds=block_seconds,
        )
        for name in "abcd":
            add(scheduler, name, 24, max_tokens=1)
            step(scheduler)
        again = add(scheduler, "a", 24, max_tokens=1)
        batch = scheduler.schedule()
        assert batch is not None
        assert again.num_cached_tokens == num_cached
        assert len(batch.swap_ins) == num_cached // BLOCK_SIZE
        host = scheduler.block_manager.host_allocator
        assert host is not None
        assert host.num_active == 0
