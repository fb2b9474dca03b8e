"""Where every layer has a sliding window, blocks behind it go back to the pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nano_vllm.engine.engine import Engine
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import (
    FakeRunner,
    check_invariants,
    make_engine,
    reference_tokens,
)

BLOCK = 8
LONG = SamplingParams(max_tokens=90, ignore_eos=True)


def make(window: int, **options: Any) -> tuple[Engine, FakeRunner]:
    names = ("num_blocks", "max_num_batched_tokens", "max_model_len")
    sizes = {name: options.pop(name) for name in names if name in options}
    runner = FakeRunner(block_size=BLOCK, window=window, **sizes)
    return make_engine(runner, **options), runner


def run(engine: Engine) -> tuple[dict[str, RequestOutput], list[int]]:
    """The outputs, and how many blocks were held behind each step."""
    outputs, held = {}, []
    while engine.has_work:
        outputs.update((output.request_id, output) for output in engine.step())
        check_invariants(engine)
        held.append(engine.scheduler.block_manager.allocator.num_active)
    return outputs, held


@pytest.mark.parametrize("window", [2, 7, 8, 9, 30])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_sequence_holds_its_window(window: int, ahead: bool) -> None:
    engine, runner = make(window, async_scheduling=ahead)
    prompt = list(range(10))
    engine.add_request("a", prompt, LONG)
    outputs, held = run(engine)
    expected = reference_tokens(prompt, LONG, 0, runner.max_model_len, window)
    assert outputs["a"].outputs[0].token_ids == expected
    # What the window covers, the block that it ends in and the one that it begins in, which goes
    # when the next one is taken.
    assert max(held[10:]) <= (window - 2) // BLOCK + 3
    without_window = run_alone(0, prompt)
    assert max(without_window) == -(-(10 + 90) // BLOCK)


def run_alone(window: int, prompt: list[int]) -> list[int]:
    engine, _ = make(window)
    engine.add_request("a", prompt, LONG)
    return run(engine)[1]


def test_a_prompt_gives_back_what_its_chunks_have_passed() -> None:
    engine, _ = make(16, max_num_batched_tokens=16, async_scheduling=False)
    engine.add_request("a", list(range(100)), SamplingParams(max_tokens=1))
    _, held = run(engine)
    assert held == [13, 13, 11, 9, 7, 5, 0]


def test_sequences_that_outgrow_the_pool_together() -> None:
    """Eight of 100 tokens are 104 blocks; 40 do, without a preemption."""
    engine, runner = make(16, num_blocks=40)
    prompts = {f"r{i}": [i] * 10 for i in range(8)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, LONG)
    outputs, _ = run(engine)
    assert engine.get_metrics().num_preemptions == 0
    assert max(len(batch.scheduled) for batch in runner.batches) == 8
    for name, prompt in prompts.items():
        expected = reference_tokens(prompt, LONG, 0, runner.max_model_len, 16)
        assert outputs[name].outputs[0].token_ids == expected


def test_freed_blocks_are_found_as_long_as_nobody_has_taken_them() -> None:
    engine, _ = make(8)
    prompt = list(range(60))
    engine.add_request("a", prompt, replace(LONG, max_tokens=40))
    for _ in range(30):
        engine.step()
    (first,) = engine.scheduler.running
    assert first.num_freed_blocks > 7
    engine.add_request("b", prompt, replace(LONG, max_tokens=4))
    outputs, _ = run(engine)
    assert outputs["b"].num_cached_tokens == 56
    for name, count in (("a", 40), ("b", 4)):
        expected = reference_tokens(prompt, replace(LONG, max_tokens=count), 0, 128, 8)
        assert outputs[name].outputs[0].token_ids == expected


def test_no_fork_from_a_sibling_whose_window_has_passed() -> None:
    """With few places, the last completion starts when the first has long gone on."""
    engine, _ = make(8, enable_prefix_caching=False, max_num_seqs=2)
    params = replace(LONG, n=3, seed=1, max_tokens=60)
    engine.add_request("x", [5], replace(LONG, max_tokens=20))
    engine.add_request("a", list(range(20)), params)
    outputs, _ = run(engine)
    for completion in outputs["a"].outputs:
        expected = reference_tokens(list(range(20)), params, completion.index, 128, 8)
        assert completion.token_ids == expected
