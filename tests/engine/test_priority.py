"""Priorities from LLM.generate to the order in which requests end."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nano_vllm.engine import admission
from nano_vllm.engine.admission import MAX_PREEMPTIONS
from nano_vllm.engine.llm import LLM
from nano_vllm.engine.waiting_queue import PATIENCE
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    check_invariants,
    make_engine,
    reference_tokens,
)

PARAMS = SamplingParams(seed=1, max_tokens=4, ignore_eos=True)


def make_llm(policy: str = "priority", num_blocks: int = 64, **options: Any) -> LLM:
    engine = make_engine(FakeRunner(num_blocks), scheduling_policy=policy, **options)
    return LLM.from_engine(engine)


def order_of_ends(outputs: list[RequestOutput]) -> list[int]:
    ends = [output.metrics.finished_time or 0.0 for output in outputs]
    return sorted(range(len(outputs)), key=ends.__getitem__)


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_one_at_a_time_they_end_in_order(policy: str) -> None:
    draw = random.Random(0)
    priorities = [draw.randrange(-3, 4) if policy == "priority" else 0 for _ in range(30)]
    prompts = [[place, 1, 2] for place in range(30)]
    llm = make_llm(policy, max_num_seqs=1)
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False, priority=priorities)
    assert [o.prompt_token_ids for o in outputs] == prompts
    in_order = list(range(30))
    if policy == "priority":
        in_order.sort(key=priorities.__getitem__)
    assert order_of_ends(outputs) == in_order
    for output in outputs:
        assert output.outputs[0].token_ids == reference_tokens(
            output.prompt_token_ids, PARAMS, 0, 128
        )


def test_completions_of_a_request_stay_together() -> None:
    llm = make_llm(max_num_seqs=1)
    params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
    outputs = llm.generate([[1], [2], [3]], params, use_tqdm=False, priority=[2, 0, 1])
    assert order_of_ends(outputs) == [1, 2, 0]


def test_urgent_ones_pass_another_patience_times() -> None:
    count = 3 * PATIENCE
    llm = make_llm(max_num_seqs=1)
    outputs = llm.generate(
        [[0], *([1, place] for place in range(count))],
        SamplingParams(seed=1, max_tokens=1),
        use_tqdm=False,
        priority=[1, *[0] * count],
    )
    assert order_of_ends(outputs).index(0) == PATIENCE


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([1], "one entry for each of the 2 prompts, got 1"),
        ([1, 2, 3], "one entry for each of the 2 prompts, got 3"),
        ([0, True], "prompt 1: priority must be an integer .*got True"),
        ([2**31, 0], r"prompt 0: priority must be an integer in \[-2\^31, 2\^31\), got 2147483648"),
        ([0, -(2**31) - 1], "prompt 1: priority must be an integer"),
        ([0, 1.0], "prompt 1: .*got 1.0"),
        ([0, "1"], "prompt 1: .*got '1'"),
        ([0, None], "prompt 1: .*got None"),
    ],
)
def test_bad_priorities(priority: Any, message: str) -> None:
    llm = make_llm()
    with pytest.raises(ValueError, match=message):
        llm.generate([[1], [2]], PARAMS, use_tqdm=False, priority=priority)
    assert not llm.engine.has_work


def test_a_priority_that_would_not_count_is_refused() -> None:
    llm = make_llm("fcfs")
    with pytest.raises(
        ValueError, match="prompt 1: priority needs scheduling_policy='priority', got 3"
    ):
        llm.generate([[1], [2]], PARAMS, use_tqdm=False, priority=[0, 3])
    assert not llm.engine.has_work


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_the_lowest_priority_loses_its_blocks_first(policy: str) -> None:
    """Though it came first: first come, first served, the last to come loses them."""
    llm = make_llm(policy, num_blocks=16)
    llm.engine.scheduler.admission.horizon = 0
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)
    prompts = [[place] * 15 for place in range(3)]
    outputs = []
    for place, prompt in enumerate(prompts):
        priority = -place if policy == "priority" else 0
        llm.engine.add_request(str(place), prompt, params, priority=priority)
        outputs += llm.engine.step()
    assert llm.get_metrics().num_running == 3
    while llm.engine.has_work:
        outputs += llm.engine.step()
    outputs.sort(key=lambda output: output.request_id)
    preemptions = [output.metrics.num_preemptions for output in outputs]
    kept, left = (0, 2) if policy == "fcfs" else (2, 0)
    assert preemptions[kept] == 0
    assert preemptions[left] > 0
    assert order_of_ends(outputs) == [kept, 1, left]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.outputs[0].token_ids == reference_tokens(prompt, params, 0, 128)


@pytest.mark.parametrize(
    ("policy", "bound"),
    [("priority", 1), ("priority", 2), ("priority", MAX_PREEMPTIONS), ("fcfs", 1), ("fcfs", 2)],
)
def test_nobody_is_preempted_more_often_than_the_bound(
    monkeypatch: pytest.MonkeyPatch, policy: str, bound: int
) -> None:
    """Ever more urgent requests keep coming, into a pool that holds one and a half contexts."""
    monkeypatch.setattr(admission, "MAX_PREEMPTIONS", bound)
    most = 0
    for seed in range(6):
        draw = random.Random(seed)
        llm = make_llm(policy, num_blocks=24)
        engine = llm.engine
        engine.scheduler.admission.horizon = 0
        prompts: dict[str, list[int]] = {}
        params: dict[str, SamplingParams] = {}
        num_finished = 0
        while len(prompts) < 60 or engine.has_work:
            if len(prompts) < 60 and draw.random() < 0.3:
                name = f"r{len(prompts)}"
                prompts[name] = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 8))]
                params[name] = SamplingParams(
                    seed=1, max_tokens=draw.choice([40, 70]), ignore_eos=True
                )
                priority = -len(prompts) if policy == "priority" else 0
                engine.add_request(name, prompts[name], params[name], priority=priority)
            for output in engine.step():
                num_finished += 1
                most = max(most, output.metrics.num_preemptions)
                assert output.metrics.num_preemptions <= bound
                assert output.outputs[0].token_ids == reference_tokens(
                    prompts[output.request_id], params[output.request_id], 0, 128
                )
        check_invariants(engine)
        assert num_finished == 60
    assert most >= min(bound, 3), "the bound is never reached"
