"""A model on a GPU generates what it generates on a CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_vllm.batch import Batch
from nano_vllm.engine.llm import LLM
from nano_vllm.runner import input_batch
from nano_vllm.sampling_params import SamplingParams
from tests.models.checkpoints import SETTINGS, make_checkpoint


def generate(
    path: Path, device: str, dtype: str, prompts: list[list[int]], **options: Any
) -> list[list[int]]:
    """Greedy tokens, in steps small enough for chunks and a pool small enough for preemption."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM(
        str(path),
        device=device,
        dtype=dtype,
        skip_tokenizer_init=True,
        **({"num_blocks": 24, "max_num_batched_tokens": 32} | options),
        block_size=8,
        max_model_len=128,
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.cuda
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_tokens_equal_those_of_the_cpu(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, seed=2, **SETTINGS[name])
    draw = random.Random(name)
    prompts = [
        [draw.randrange(3, 199) for _ in range(draw.choice((1, 8, 9, 40, 63)))] for _ in range(12)
    ]
    expected = generate(tmp_path, "cpu", "float32", prompts)
    assert generate(tmp_path, "cuda", "float32", prompts) == expected


@pytest.mark.cuda
def test_sixteen_bits_begin_alike(tmp_path: Path) -> None:
    """bfloat16 may flip a near tie, after which all differs: most sequences begin with the tokens
    of float32.
    """
    make_checkpoint(tmp_path, seed=3)
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 199) for _ in range(40)] for _ in range(16)]
    expected = generate(tmp_path, "cpu", "float32", prompts)
    got = generate(tmp_path, "cuda", "bfloat16", prompts)
    alike = sum(a[:3] == b[:3] for a, b in zip(expected, got, strict=True))
    assert alike >= 12, f"{alike} of 16 begin alike"


def scores(path: Path, device: str, dtype: str, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of each prompt's tokens, computed in chunks."""
    with LLM(
        str(path),
        device=device,
        dtype=dtype,
        skip_tokenizer_init=True,
        num_blocks=64,
        block_size=8,
        max_model_len=128,
        max_num_batched_tokens=32,
    ) as llm:
        contexts, rest = [p[:1] for p in prompts], [p[1:] for p in prompts]
        return [torch.tensor(one.logprobs) for one in llm.score(contexts, rest, use_tqdm=False)]


@pytest.mark.cuda
@pytest.mark.parametrize("name", SETTINGS)
def test_sixteen_bits_are_as_far_off_as_on_the_cpu(tmp_path: Path, name: str) -> None:
    """Its bfloat16 rounds in other places, but is no further from float32."""
    make_checkpoint(tmp_path, seed=7, **SETTINGS[name])
    draw = random.Random(name)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in (9, 40, 63)]
    exact = torch.cat(scores(tmp_path, "cpu", "float32", prompts))
    rounded = torch.cat(scores(tmp_path, "cpu", "bfloat16", prompts))
    got = torch.cat(scores(tmp_path, "cuda", "bfloat16", prompts))
    usual, error = ((one - exact).square().mean().sqrt() for one in (rounded, got))
    assert 0 < error <= 1.5 * usual, f"error {error:.3g}, on the CPU {usual:.3g}"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_graphs_generate_what_eager_steps_do(
    tmp_path: Path, dtype: str, kv_cache_dtype: str
) -> None:
    """Eight sequences of one length, 256 tokens together, so that products have as many rows with a
    graph as without: their bits are the same then.
    """
    make_checkpoint(tmp_path, seed=4)
    draw = random.Random(4)
    prompts = [[draw.randrange(3, 199) for _ in range(32)] for _ in range(8)]
    room: dict[str, Any] = {"num_blocks": 200, "max_num_batched_tokens": 512}
    room["kv_cache_dtype"] = kv_cache_dtype
    expected = generate(tmp_path, "cuda", dtype, prompts, enforce_eager=True, **room)
    assert generate(tmp_path, "cuda", dtype, prompts, **room) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_graphs_of_few_sequences(tmp_path: Path, count: int) -> None:
    """Sizes that have a graph of their own, and others, padded to the next."""
    make_checkpoint(tmp_path, seed=5)
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 199) for _ in range(20)] for _ in range(count)]
    expected = generate(tmp_path, "cpu", "float32", prompts)
    assert generate(tmp_path, "cuda", "float32", prompts) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_chunks_whose_tokens_decode_generate_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Beside streams, on Hopper: rounded otherwise, most sequences begin with the same tokens."""
    make_checkpoint(tmp_path, seed=6)
    draw = random.Random(6)
    prompts = [[draw.randrange(3, 199) for _ in range(70 + 2 * i)] for i in range(16)]
    room: dict[str, Any] = {"num_blocks": 400, "max_num_batched_tokens": 16}
    expected = generate(tmp_path, "cuda", dtype, prompts, **room)
    monkeypatch.setattr(input_batch, "MIN_SPREAD_CONTEXT", 16)
    monkeypatch.setattr(input_batch, "SPREAD_PAIRS", 1 << 30)
    monkeypatch.setattr(input_batch, "SHARED_PREFIX_BYTES", 0)
    monkeypatch.setattr(input_batch, "DECODE_QUERIES", 1)
    num_spread = 0
    prompt_rows = input_batch.InputBatch.prompt_rows

    def counted(self: input_batch.InputBatch, batch: Batch) -> list[input_batch.AttentionRow]:
        nonlocal num_spread
        rows = prompt_rows(self, batch)
        num_spread += len(rows) > len(batch.scheduled) - batch.num_decodes
        return rows

    monkeypatch.setattr(input_batch.InputBatch, "prompt_rows", counted)
    got = generate(tmp_path, "cuda", dtype, prompts, **room)
    assert num_spread > 16 or torch.cuda.get_device_capability() != (9, 0)
    alike = sum(a[:3] == b[:3] for a, b in zip(expected, got, strict=True))
    assert alike >= 13, f"{alike} of 16 begin alike"
