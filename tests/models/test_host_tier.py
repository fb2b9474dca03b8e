"""What a small pool evicts comes back from host memory, and nobody can tell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.engine.llm import LLM
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import check_invariants
from tests.engine.tiny_model import draw_prompt, make_llm

pytestmark = pytest.mark.usefixtures("one_thread")

PLENTY = 8 << 20
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def draw_prompts(seed: int, count: int = 20, shortest: int = 20) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw_prompt(draw, draw.randrange(shortest, shortest + 30)) for _ in range(count)]


def tokens_of(llm: LLM, prompts: list[list[int]], params: SamplingParams = PARAMS) -> Any:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def without_a_tier(path: Path, prompts: list[list[int]], params: SamplingParams = PARAMS) -> Any:
    with make_llm(path, num_blocks=300, enable_prefix_caching=False) as llm:
        return tokens_of(llm, prompts, params)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_run_loads_what_the_first_has_computed(
    tiny_checkpoint: Path, dtype: str, kv_cache_dtype: str
) -> None:
    """One prompt after the other, in a pool that the last of them fills."""
    prompts = draw_prompts(0)
    with make_llm(
        tiny_checkpoint,
        num_blocks=8,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        host_cache_memory=PLENTY,
    ) as llm:
        first = [tokens_of(llm, [prompt]) for prompt in prompts]
        assert llm.get_metrics().num_cached_tokens == 0
        assert llm.get_metrics().num_loaded_tokens == 0
        second = []
        for prompt in prompts[:-1]:
            loaded = llm.get_metrics().num_loaded_tokens
            (output,) = llm.generate([prompt], PARAMS, use_tqdm=False)
            second.append([[output.outputs[0].token_ids]])
            assert output.num_cached_tokens == (len(prompt) - 1) // 8 * 8
            assert llm.get_metrics().num_loaded_tokens - loaded == output.num_cached_tokens
            check_invariants(llm.engine)
        assert second == first[:-1]


def test_all_at_once_under_pressure(tiny_checkpoint: Path) -> None:
    prompts = draw_prompts(1, 30, shortest=9)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    expected = without_a_tier(tiny_checkpoint, prompts, params)
    with make_llm(tiny_checkpoint, num_blocks=14, host_cache_memory=PLENTY) as llm:
        assert tokens_of(llm, prompts, params) == expected
        metrics = llm.get_metrics()
        assert metrics.num_preemptions > 0
        assert metrics.num_loaded_tokens > 0, "what was preempted comes back"
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [[o.outputs[0].token_ids] for o in outputs] == expected
        assert all(o.num_cached_tokens == (len(o.prompt_token_ids) - 1) // 8 * 8 for o in outputs)
        assert llm.get_metrics().num_loaded_tokens > metrics.num_loaded_tokens
        assert llm.get_metrics().num_leaked_blocks == 0
        assert llm.get_metrics().num_free_blocks == 14


@pytest.mark.parametrize("num_host_blocks", [1, 3, 20])
def test_a_tier_that_is_too_small_for_all(tiny_checkpoint: Path, num_host_blocks: int) -> None:
    """Common beginnings, completions that fork, chunks; what is lost is computed again."""
    draw = random.Random(num_host_blocks)
    heads = [draw_prompt(draw, 24) for _ in range(3)]
    prompts = [[*draw.choice(heads), *draw_prompt(draw, draw.randrange(1, 20))] for _ in range(25)]
    params = SamplingParams(n=2, seed=1, max_tokens=15, ignore_eos=True)
    expected = without_a_tier(tiny_checkpoint, prompts, params)
    block_bytes = 2 * 2 * 2 * 8 * 64 * 4
    with make_llm(
        tiny_checkpoint,
        num_blocks=12,
        max_num_batched_tokens=19,
        host_cache_memory=num_host_blocks * block_bytes,
    ) as llm:
        assert llm.engine.runner.num_host_blocks == num_host_blocks
        for _ in range(2):
            assert tokens_of(llm, prompts, params) == expected
        assert llm.get_metrics().num_loaded_tokens > 0
        assert llm.get_metrics().num_preemptions > 0
        check_invariants(llm.engine)


def test_a_session_comes_back_from_host_memory(tiny_checkpoint: Path) -> None:
    prompt, others = list(range(3, 33)), draw_prompts(2)
    with make_llm(tiny_checkpoint, num_blocks=12, host_cache_memory=PLENTY) as llm:
        session = llm.session(prompt)
        session.generate(PARAMS)
        tokens_of(llm, others)
        output = session.generate(PARAMS)
        assert output.num_cached_tokens == 40
        assert session.token_ids[42:] == output.outputs[0].token_ids
        tokens_of(llm, others)
        session.rollback(22)
        assert len(session.token_ids) == 32
        session.pin()
        assert llm.get_metrics().num_free_blocks == 12 - 4
        session.close()
    ((expected,),) = without_a_tier(
        tiny_checkpoint, [prompt], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    )
    assert output.prompt_token_ids[30:] + output.outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_cache_memory": 100}, "at least one block of 16384 bytes, got 100"),
        ({"host_cache_memory": 0}, "host_cache_memory must be an integer of at least 1, got 0"),
        (
            {"host_cache_memory": 1 << 20, "enable_prefix_caching": False},
            "host_cache_memory needs enable_prefix_caching, got 1048576",
        ),
        (
            {"host_cache_memory": 1 << 60},
            "host_cache_memory = 1152921504606846976 takes 1073741824.00 GiB, there are ",
        ),
        ({"num_blocks": 1 << 50}, "num_blocks = 1125899906842624 takes .* GiB, there are "),
        ({"num_blocks": None, "kv_cache_memory": 1 << 60}, "kv_cache_memory = .* takes 1073741824"),
    ],
)
def test_memory_that_cannot_be(
    tiny_checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(tiny_checkpoint, **options)
