"""Equal prompts that come together are computed once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.batch import Batch
from nano_vllm.engine.llm import LLM
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.fake_runner import FakeRunner, StepBroke, make_engine, reference_tokens
from tests.engine.tiny_model import draw_prompt, make_llm

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 8
PROMPT = list(range(100))
PARAMS = [SamplingParams(seed=seed, max_tokens=9, ignore_eos=True) for seed in range(8)]


def make_fake(
    num_tokens: int = 512, num_blocks: int = 200, runs_ahead: bool = True, **options: Any
) -> LLM:
    runner = FakeRunner(num_blocks, SIZE, max_num_batched_tokens=num_tokens, runs_ahead=runs_ahead)
    return LLM.from_engine(make_engine(runner, **options))


def num_prefilled(llm: LLM) -> int:
    """Tokens computed but for those of sequences that decode."""
    runner = llm.engine.runner
    assert isinstance(runner, FakeRunner)
    return sum(b.num_tokens - b.num_decodes for b in runner.batches)


def check_tokens(outputs: list[RequestOutput], params: list[SamplingParams]) -> None:
    for output, own in zip(outputs, params, strict=True):
        for completion in output.outputs:
            assert completion.token_ids == reference_tokens(
                output.prompt_token_ids, own, completion.index, 128
            )


@pytest.mark.parametrize(
    "options", [{}, {"num_tokens": 30}, {"num_tokens": 7}, {"enable_chunked_prefill": False}]
)
@pytest.mark.parametrize("length", [96, 97, 100])
def test_an_equal_prompt_is_computed_once(options: dict[str, Any], length: int) -> None:
    llm = make_fake(**options)
    prompt = PROMPT[:length]
    outputs = llm.generate([prompt] * 8, PARAMS, use_tqdm=False)
    check_tokens(outputs, PARAMS)
    found = (length - 1) // SIZE * SIZE
    assert [output.num_cached_tokens for output in outputs] == [0] + [found] * 7
    assert num_prefilled(llm) == length + 7 * (length - found)


def test_all_of_them_in_one_step() -> None:
    llm = make_fake()
    runner = llm.engine.runner
    for index, params in enumerate(PARAMS):
        llm.engine.add_request(str(index), PROMPT, params)
    llm.engine.step()
    first = runner.batches[0]  # type: ignore[attr-defined]
    assert [s.num_tokens for s in first.scheduled] == [100] + [4] * 7
    tables = [s.sequence.block_table for s in first.scheduled]
    assert {tuple(table[:12]) for table in tables} == {tuple(tables[0][:12])}
    assert len({table[12] for table in tables}) == 8
    metrics = llm.get_metrics()
    assert metrics.num_blocks - metrics.num_free_blocks == 12 + 8


def test_without_prefix_caching_each_computes_its_own() -> None:
    llm = make_fake(enable_prefix_caching=False)
    outputs = llm.generate([PROMPT] * 8, PARAMS, use_tqdm=False)
    check_tokens(outputs, PARAMS)
    assert num_prefilled(llm) == 800


def test_prompts_that_part_ways_share_what_they_have_in_common() -> None:
    llm = make_fake()
    prompts = [[*PROMPT[:40], *range(place, place + 20)] for place in range(100, 108)]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    check_tokens(outputs, PARAMS)
    assert num_prefilled(llm) == 60 + 7 * 20


def test_each_in_its_own_salt() -> None:
    llm = make_fake(1024)
    prompts = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in "abab"]
    outputs = llm.generate(prompts, PARAMS[:4], use_tqdm=False)
    check_tokens(outputs, PARAMS[:4])
    assert num_prefilled(llm) == 2 * 100 + 2 * 4


def test_with_completions_and_beams_beside() -> None:
    llm = make_fake()
    engine = llm.engine
    several = SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True)
    beams = BeamSearchParams(beam_width=3, max_tokens=1)
    requests = [
        llm.make_request(PROMPT, several),
        engine.make_beam_request("beams", PROMPT, beams),
        llm.make_request(PROMPT, PARAMS[0]),
    ]
    outputs = llm.run(requests, use_tqdm=False)
    check_tokens([outputs[0], outputs[2]], [several, PARAMS[0]])
    # Both forks of the first come a step later, and compute a last token each.
    assert num_prefilled(llm) == 100 + 4 + 4 + 2


@pytest.mark.parametrize("breaks", ["before", "after"])
def test_a_step_that_breaks_takes_its_hits_along(breaks: str) -> None:
    """What it should have computed may be missing: nobody finds it afterwards."""
    llm = make_fake()
    runner = llm.engine.runner
    assert isinstance(runner, FakeRunner)
    for index, params in enumerate(PARAMS):
        llm.engine.add_request(str(index), PROMPT, params)
    runner.breaks = breaks
    with pytest.raises(StepBroke):
        llm.engine.step()
    metrics = llm.get_metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    outputs = []
    while llm.engine.has_work:
        outputs += llm.engine.step()
    check_tokens(sorted(outputs, key=lambda output: output.request_id), PARAMS)
    assert llm.engine.scheduler.block_manager.allocator.num_active == 0


@pytest.mark.parametrize("fails", ["0", "3"])
def test_one_that_fails_harms_none_that_shares_with_it(fails: str) -> None:
    runner = FakeRunner(200, SIZE, max_num_batched_tokens=512, failing={fails})
    engine = make_engine(runner)
    for index, params in enumerate(PARAMS):
        engine.add_request(str(index), PROMPT, params)
    outputs = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step()}
    assert outputs.pop(fails).outputs[0].finish_reason == "abort"
    for name, output in outputs.items():
        check_tokens([output], [PARAMS[int(name)]])


@pytest.mark.parametrize("num_tokens", [400, 30, 9])
def test_a_model_reads_what_is_written_in_the_same_step(
    tiny_checkpoint: Path, num_tokens: int
) -> None:
    """Every layer writes the keys and values of all tokens before it reads any."""
    draw = random.Random(0)
    prompt = draw_prompt(draw, 45)
    prompts = [prompt] * 4 + [[*prompt[:30], *draw_prompt(draw, 9)] for _ in range(3)] + [prompt]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens = []
    for caching in (True, False):
        with make_llm(
            tiny_checkpoint,
            num_blocks=100,
            max_num_batched_tokens=num_tokens,
            enable_prefix_caching=caching,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens.append([output.outputs[0].token_ids for output in outputs])
            if caching:
                cached = [output.num_cached_tokens for output in outputs]
                assert cached == [0, 40, 40, 40, 24, 24, 24, 40]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("length", [16, 20])
def test_nobody_forks_from_what_the_same_step_computes(length: int) -> None:
    """A preempted completion comes back by hits of the step, and one that has yet to start comes
    with it: what it would copy is not written yet.
    """
    params = SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True)
    llm = make_fake(max_num_seqs=3, runs_ahead=False)
    engine = llm.engine
    scheduler = engine.scheduler
    scheduler._running.max_num_seqs = 2
    engine.add_request("r", PROMPT[:length], params)
    for _ in range(7):
        engine.step()
    assert [s.num_output_tokens for s in scheduler.running] == [7, 6]
    for sequence in scheduler.running:
        scheduler._preempt(sequence, Batch([]))
    for block in range(200):
        scheduler.block_manager.allocator.forget(block)
    scheduler._running.max_num_seqs = 3
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    check_tokens(outputs, [params])
