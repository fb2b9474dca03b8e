"""Whatever arrives, whatever is aborted and however small the pool, every stream of tokens is that
of a sequence which runs alone.
"""

from __future__ import annotations

import contextlib
import os
import random
from typing import Any

import pytest

from nano_vllm.engine.admission import MAX_PREEMPTIONS
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    StepBroke,
    check_invariants,
    make_engine,
    reference_beams,
    reference_tokens,
)

NUM_TRACES = int(os.environ.get("NANO_VLLM_TEST_TRACES", "10000"))
"""Of some 170 steps each."""
NUM_GROUPS = 8


def check_batch(engine: Any, runner: FakeRunner) -> None:
    batch = runner.batches[-1]
    assert 0 < batch.num_tokens <= runner.max_num_batched_tokens
    scheduled = [s.sequence.seq_id for s in batch.scheduled]
    assert len(set(scheduled)) == len(scheduled)
    assert not {s.seq_id for s in batch.preempted} & set(scheduled)


def run_trace(seed: int, num_stages: int = 1) -> dict[str, int]:
    """Run a random trace and compare; what happened in it, so that a test can ask for variety.

    Args:
        seed: of the trace.
        num_stages: steps that are under way at the same time.
    """
    draw = random.Random(seed)
    block_size = draw.choice([8, 16])
    max_model_len = draw.choice([40, 64, 100])
    chunked = draw.random() < 0.7
    # From a pool that one sequence fills to one that never runs dry
    smallest = -(-max_model_len // block_size)
    runner = FakeRunner(
        num_blocks=draw.choice([smallest, smallest + 2, 3 * smallest, 40 * smallest]),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=draw.choice([5, 16, 64]) if chunked else max_model_len,
        num_host_blocks=draw.choice([0, 1, 5, 40]),
        runs_ahead=num_stages == 1,
        window=draw.choice([0, 0, 2, 5, 8, 24]),
    )
    engine = make_engine(
        runner,
        async_scheduling=draw.random() < 0.7,
        pipeline_parallel_size=num_stages,
        max_num_seqs=draw.choice([1, 3, 16]),
        enable_chunked_prefill=chunked,
        enable_prefix_caching=draw.random() < 0.7,
        scheduling_policy=draw.choice(["fcfs", "priority"]),
    )
    engine.scheduler.admission.horizon = draw.choice([0, 8, 64])
    heads = [[draw.randrange(VOCAB_SIZE) for _ in range(max_model_len)] for _ in range(2)]
    # Blocks of equal tokens, which differ in what comes before them alone
    heads.append(heads[0][: 2 * block_size] + heads[0][:block_size] * 10)
    heads.append(heads[1][:block_size] + heads[0][:block_size] * 10)
    params: dict[str, SamplingParams] = {}
    prompts: dict[str, list[int]] = {}
    beams: dict[str, BeamSearchParams] = {}
    finished, aborted, broken = {}, set(), 0
    pins: list[int] = []
    pinned = freed = 0
    to_come = draw.randrange(5, 25)
    while to_come or engine.has_work:
        while to_come and draw.random() < (0.4 if engine.has_work else 1.0):
            to_come -= 1
            request_id = f"r{to_come}"
            length = draw.randrange(1, max_model_len)
            shared = draw.randrange(length + 1)
            head = draw.choice(heads)[:shared]
            prompts[request_id] = head + [
                draw.randrange(VOCAB_SIZE) for _ in range(length - len(head))
            ]
            urgency, salt = draw.randrange(3), draw.choice([None, None, "salt"])
            if engine.config.scheduling_policy == "fcfs":
                urgency = 0
            if draw.random() < 0.2:
                beams[request_id] = BeamSearchParams(
                    beam_width=draw.randrange(1, 1 + min(5, engine.scheduler.max_num_seqs)),
                    max_tokens=draw.choice([1, 4, 12]),
                    early_stopping=draw.choice([True, False, "never"]),
                    length_penalty=draw.choice([-1.0, 0.0, 1.0]),
                    ignore_eos=draw.random() < 0.3,
                )
                request = engine.make_beam_request(
                    request_id, prompts[request_id], beams[request_id], None, urgency, salt
                )
                engine.add(request)
                continue
            params[request_id] = SamplingParams(
                n=draw.choice([1, 1, 1, 2, 4]),
                seed=draw.randrange(100),
                max_tokens=draw.choice([1, 4, 30, None]),
                ignore_eos=draw.random() < 0.5,
            )
            engine.add_request(
                request_id,
                prompts[request_id],
                params[request_id],
                priority=urgency,
                cache_salt=salt,
            )
        if engine.config.enable_prefix_caching and draw.random() < 0.05:
            if pins and draw.random() < 0.5:
                engine.unpin(pins.pop(draw.randrange(len(pins))))
            with contextlib.suppress(ValueError):
                pins.append(engine.pin(draw.choice(heads), draw.choice([None, "salt"])))
            pinned += sum(map(len, engine.scheduler.block_manager.pins.values()))
        if draw.random() < 0.03:
            runner.breaks = draw.choice(["before", "after", "late", "lost"])
        num_batches = len(runner.batches)
        is_idle = engine.has_work and not engine._launched
        try:
            outputs = engine.step()
        except StepBroke:
            broken += 1
            outputs = []
        else:
            check_batch(engine, runner)
            assert len(runner.batches) > num_batches or not is_idle, "there was work to schedule"
        for output in outputs:
            assert output.finished
            finished[output.request_id] = output
            if output.request_id in params:
                most = len(output.outputs) * MAX_PREEMPTIONS
                assert output.metrics.num_preemptions <= most
        check_invariants(engine)
        freed += sum(sequence.num_freed_blocks for sequence in engine.scheduler.running)
        if draw.random() < 0.05:
            request_id = draw.choice(list(prompts))
            if engine.abort(request_id) is not None:
                aborted.add(request_id)
                check_invariants(engine)

    assert set(finished) | aborted == set(prompts)
    for request_id, output in finished.items():
        if request_id in beams:
            found = [(o.token_ids, o.cumulative_logprob) for o in output.outputs]
            expected = reference_beams(
                prompts[request_id], beams[request_id], max_model_len, runner.window
            )
            assert found == [(h.token_ids, h.cumulative_logprob) for h in expected]
            continue
        for completion in output.outputs:
            assert completion.token_ids == reference_tokens(
                prompts[request_id],
                params[request_id],
                completion.index,
                max_model_len,
                runner.window,
            )
    for pin in pins:
        engine.unpin(pin)
    allocator = engine.scheduler.block_manager.allocator
    assert allocator.num_active == 0
    assert allocator.num_free == runner.num_blocks
    metrics = engine.get_metrics()
    assert not metrics.num_leaked_blocks
    return {
        "preempted": metrics.num_preemptions,
        "cached": metrics.num_cached_tokens,
        "copied": sum(len(batch.block_copies) for batch in runner.batches),
        "ahead": sum(batch.lead for batch in runner.batches),
        "ahead with prompts": sum(b.lead for b in runner.batches if not b.is_decode),
        "aborted": len(aborted),
        "broken": broken,
        "pinned": pinned,
        "freed": freed,
        "searched": sum(request_id in finished for request_id in beams),
        "loaded": metrics.num_loaded_tokens,
        "swapped out": sum(len(batch.swap_outs) for batch in runner.batches),
        "chunked": sum(not s.samples for batch in runner.batches for s in batch.scheduled),
    }


@pytest.mark.parametrize("group", range(NUM_GROUPS))
def test_every_stream_is_that_of_a_sequence_alone(group: int) -> None:
    happened: dict[str, int] = {}
    for seed in range(NUM_TRACES * group // NUM_GROUPS, NUM_TRACES * (group + 1) // NUM_GROUPS):
        for name, count in run_trace(seed).items():
            happened[name] = happened.get(name, 0) + count
    assert all(happened.values()), f"the traces lack variety: {happened}"


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_steps_under_way_in_a_pipeline(num_stages: int) -> None:
    happened: dict[str, int] = {}
    for seed in range(NUM_TRACES // 100):
        for name, count in run_trace(seed, num_stages).items():
            happened[name] = happened.get(name, 0) + count
    assert not happened.pop("ahead") + happened.pop("ahead with prompts")
    assert all(happened.values()), f"the traces lack variety: {happened}"
