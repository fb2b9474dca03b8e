"""References to blocks that somebody loses are noticed, told and taken back within a step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nano_vllm._core import BlockOwner
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.engine.engine import Engine
from nano_vllm.engine.llm import LLM
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence
from tests.engine.fake_runner import (
    FakeRunner,
    check_invariants,
    make_engine,
    reference_tokens,
)
from tests.engine.tiny_model import draw_prompt, make_llm

NUM_BLOCKS = 64
PARAMS = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
PROMPTS = {"a": [1] * 20, "b": [2] * 9, "c": [1] * 17}


def start(max_num_batched_tokens: int = 64, num_steps: int = 3, num_host_blocks: int = 0) -> Engine:
    """All of PROMPTS under way."""
    runner = FakeRunner(
        NUM_BLOCKS,
        max_num_batched_tokens=max_num_batched_tokens,
        num_host_blocks=num_host_blocks,
    )
    engine = make_engine(runner)
    for name, prompt in PROMPTS.items():
        engine.add_request(name, prompt, PARAMS)
    for _ in range(num_steps):
        engine.step()
    return engine


def finish(engine: Engine) -> None:
    """What is under way ends as if nothing had happened."""
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
        check_invariants(engine)
    assert set(outputs) == set(PROMPTS)
    for name, output in outputs.items():
        expected = reference_tokens(PROMPTS[name], PARAMS, 0, 128)
        assert output.outputs[0].token_ids == expected
    assert engine.get_metrics().num_free_blocks == NUM_BLOCKS


def manager_of(engine: Engine) -> BlockManager:
    return engine.scheduler.block_manager


def share_a_running_one(engine: Engine) -> str:
    manager_of(engine).allocator.share(engine.scheduler.running[0].block_table[0])
    return "1 references of a sequence"


def share_the_last_one(engine: Engine) -> str:
    manager_of(engine).allocator.share(engine.scheduler.running[0].block_table[-1])
    return "1 references of a sequence"


def share_it_thrice(engine: Engine) -> str:
    for _ in range(3):
        manager_of(engine).allocator.share(engine.scheduler.running[0].block_table[0])
    return "3 references of a sequence"


def allocate(engine: Engine) -> str:
    manager_of(engine).allocator.allocate()
    return "1 references of a sequence"


def share_for_a_pin(engine: Engine) -> str:
    block = engine.scheduler.running[0].block_table[0]
    manager_of(engine).allocator.share(block, BlockOwner.PIN)
    return "1 references of a pin"


def forget_a_pin(engine: Engine) -> str:
    manager = manager_of(engine)
    pin = engine.pin([1] * 8)
    manager._num_pinned -= len(manager._pins.pop(pin))
    return "1 references of a pin"


def allocate_for_a_transfer(engine: Engine) -> str:
    manager_of(engine).allocator.allocate(BlockOwner.TRANSFER)
    return "1 references of a transfer"


def hold_on_host(engine: Engine) -> str:
    host = manager_of(engine).host_allocator
    assert host is not None
    host.allocate(BlockOwner.TRANSFER)
    return "1 references of a transfer to host block"


def share_on_host(engine: Engine) -> str:
    host = manager_of(engine).host_allocator
    assert host is not None
    host.share(host.allocate())
    return "2 references of a sequence to host block"


LOSSES = (
    share_a_running_one,
    share_the_last_one,
    share_it_thrice,
    allocate,
    share_for_a_pin,
    forget_a_pin,
    allocate_for_a_transfer,
    hold_on_host,
    share_on_host,
)


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize(("num_tokens", "num_steps"), [(64, 3), (10, 2), (64, 1)])
def test_a_lost_reference_is_taken_back_within_a_step(
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[Engine], str],
    num_tokens: int,
    num_steps: int,
) -> None:
    engine = start(num_tokens, num_steps, num_host_blocks=3)
    check_invariants(engine)
    assert engine.get_metrics().num_leaked_blocks == 0
    told = lose(engine)
    with caplog.at_level(logging.WARNING):
        engine.step()
    (record,) = caplog.records
    assert told in record.getMessage()
    assert "were lost, and are taken back" in record.getMessage()
    assert engine.get_metrics().num_leaked_blocks == 1
    check_invariants(engine)
    caplog.clear()
    finish(engine)
    assert not caplog.records
    assert engine.get_metrics().num_leaked_blocks == 1


def test_several_at_once_of_all_kinds() -> None:
    engine = start(num_host_blocks=3)
    for lose in LOSSES:
        lose(engine)
    engine.step()
    check_invariants(engine)
    assert engine.get_metrics().num_leaked_blocks >= 6
    finish(engine)


def test_pins_keep_what_is_theirs() -> None:
    engine = start()
    llm = LLM.from_engine(engine)
    manager = manager_of(engine)
    pin = engine.pin([1] * 16)
    assert manager.pins == {pin: engine.scheduler.running[0].block_table[:2]}
    lost = manager.pins[pin][0]
    for owner in (BlockOwner.SEQUENCE, BlockOwner.PIN):
        manager.allocator.share(lost, owner)
    manager.allocator.allocate(BlockOwner.PIN)
    engine.step()
    assert engine.get_metrics().num_leaked_blocks == 3
    while engine.has_work:
        engine.step()
    assert engine.get_metrics().num_free_blocks == NUM_BLOCKS - 2
    engine.unpin(pin)
    assert engine.get_metrics().num_free_blocks == NUM_BLOCKS
    output = llm.generate([1] * 20, PARAMS, use_tqdm=False)[0]
    assert output.num_cached_tokens == 0, "what a lost block holds is not known"
    assert output.outputs[0].token_ids == reference_tokens([1] * 20, PARAMS, 0, 128)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_pool_that_leaked_dry_goes_on(num_steps: int) -> None:
    """All that is free is taken away ahead of each step, where nobody runs too."""
    engine = start(num_steps=num_steps)
    outputs = {}
    while engine.has_work:
        allocator = manager_of(engine).allocator
        allocator.allocate_many(allocator.num_free)
        outputs |= {output.request_id: output for output in engine.step()}
        assert not engine.scheduler.reclaim_leaks()
    for name, output in outputs.items():
        assert output.outputs[0].token_ids == reference_tokens(PROMPTS[name], PARAMS, 0, 128)
    assert set(outputs) == set(PROMPTS)


def test_what_was_found_on_the_host_for_nobody_is_taken_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a sequence that is neither admitted nor sent back: it holds blocks of both pools."""
    prompts = [[1] * 32, [2] * 40, [3] * 40, [4] * 40]
    engine = make_engine(FakeRunner(16, num_host_blocks=16))
    llm = LLM.from_engine(engine)
    llm.generate(prompts, PARAMS, use_tqdm=False)
    manager = manager_of(engine)
    host = manager.host_allocator
    assert host is not None
    lost = Sequence(99, "lost", 0, prompts[0], PARAMS)
    manager.share_prefix(lost)
    held = host.num_active
    assert held
    engine.add_request("a", prompts[1], PARAMS)
    with caplog.at_level(logging.WARNING):
        outputs = engine.step()
    assert len(caplog.records) == held + len(lost.block_table)
    assert engine.get_metrics().num_leaked_blocks == len(caplog.records)
    check_invariants(engine)
    caplog.clear()
    while engine.has_work:
        outputs = engine.step()
        check_invariants(engine)
    outputs += llm.generate(prompts, PARAMS, use_tqdm=False)
    for prompt, output in zip([prompts[1], *prompts], outputs, strict=True):
        assert output.outputs[0].token_ids == reference_tokens(prompt, PARAMS, 0, 128)
    assert not caplog.records
    # What has lost its claim cannot give it up once more.
    lost.block_table = []
    manager.free(lost)
    assert host.num_active == 0


def test_a_host_pool_that_leaked_dry_goes_on() -> None:
    """Before each step all of it is taken away: what is evicted finds room all the same."""
    engine = make_engine(FakeRunner(16, num_host_blocks=8))
    outputs: dict[str, list[int]] = {}
    prompts = {str(place): [place % 5] * 30 for place in range(25)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, PARAMS)
    host = manager_of(engine).host_allocator
    assert host is not None
    while engine.has_work:
        host.allocate_many(host.num_free, BlockOwner.TRANSFER)
        for output in engine.step():
            outputs[output.request_id] = output.outputs[0].token_ids
        assert host.num_active == 0
    for name, prompt in prompts.items():
        assert outputs[name] == reference_tokens(prompt, PARAMS, 0, 128)
    assert engine.get_metrics().num_leaked_blocks


def test_a_missing_reference_is_an_error() -> None:
    engine = start()
    sequence = engine.scheduler.running[1]
    manager_of(engine).allocator.free(sequence.block_table[-1])
    with pytest.raises(RuntimeError, match="has 1 owners more than references"):
        engine.step()


@pytest.mark.parametrize("num_host_blocks", [0, 40])
def test_nothing_leaks_without_a_reason(
    caplog: pytest.LogCaptureFixture, num_host_blocks: int
) -> None:
    draw = random.Random(0)
    runner = FakeRunner(20, max_num_batched_tokens=16, num_host_blocks=num_host_blocks)
    llm = LLM.from_engine(make_engine(runner))
    prompts = [[draw.randrange(3)] * draw.randrange(1, 80) for _ in range(30)]
    llm.generate(prompts, SamplingParams(n=2, seed=1, max_tokens=20), use_tqdm=False)
    llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=20), use_tqdm=False)
    with llm.session(prompts[0]) as session:
        session.generate(PARAMS)
        fork = session.fork()[0]
        fork.generate(PARAMS)
    assert not caplog.records
    metrics = llm.get_metrics()
    assert (metrics.num_leaked_blocks, metrics.num_free_blocks) == (0, 20)
    host = manager_of(llm.engine).host_allocator
    assert host is None or host.num_active == 0


def test_outputs_of_a_model_stay_right(tiny_checkpoint: Path, one_thread: None) -> None:
    """What was reclaimed is out of the index, and given away without harm."""
    draw = random.Random(1)
    prompts = [draw_prompt(draw, 30) for _ in range(4)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with make_llm(tiny_checkpoint, num_blocks=24) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
        engine = llm.engine
        requests = [llm.make_request(prompt, params) for prompt in prompts]
        results = {}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            allocator = manager_of(engine).allocator
            for sequence in engine.scheduler.running:
                allocator.share(draw.choice(sequence.block_table))
            if allocator.num_free:
                allocator.allocate()
            results |= {output.request_id: output for output in engine.step()}
            check_invariants(engine)
        assert [results[r.request_id].outputs[0].token_ids for r in requests] == expected
        assert llm.get_metrics().num_leaked_blocks > 20
        assert llm.get_metrics().num_free_blocks == 24
