"""Bytes, operations and floors of the bundled models are those worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nano_vllm.bench.roofline import Roofline, share
from nano_vllm.bench.workload import Workload
from nano_vllm.config import ModelConfig
from nano_vllm.models.registry import model_class
from nano_vllm.step_record import Interval, StepRecord
from nano_vllm.weights.model_config import load_model_config
from nano_vllm.weights.resolve import resolve_model

COPY, MATMUL = 3.03e12, 785e12


def roofline(name: str, cache_dtype: torch.dtype = torch.bfloat16) -> Roofline:
    config = load_model_config(resolve_model(name, "dummy"), model_class)
    return Roofline(config, torch.bfloat16, cache_dtype, COPY, MATMUL)


def even(batch: int, input_len: int, output_len: int) -> Workload:
    return Workload([[0] * input_len] * batch, [output_len] * batch)


@pytest.mark.parametrize(
    ("name", "weight_bytes"), [("llama-3.1-8b", 15.01e9), ("qwen3-0.6b", 1.192e9)]
)
def test_weights_of_a_step(name: str, weight_bytes: float) -> None:
    assert roofline(name).step_weight_bytes == pytest.approx(weight_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "batch", "milliseconds"),
    [
        ("llama-3.1-8b", 1, 4.96),
        ("llama-3.1-8b", 128, 6.37),
        ("qwen3-0.6b", 1, 0.40),
        ("qwen3-0.6b", 128, 1.63),
    ],
)
def test_floor_of_a_decode_step(name: str, batch: int, milliseconds: float) -> None:
    """256 tokens of context on average."""
    decode = roofline(name).decode_seconds(even(batch, 128, 256))
    assert decode is not None
    assert decode / 255 * 1e3 == pytest.approx(milliseconds, abs=0.006)


@pytest.mark.parametrize(("name", "tflop"), [("llama-3.1-8b", 985.2), ("qwen3-0.6b", 88.5)])
def test_operations_of_long_prompts(name: str, tflop: float) -> None:
    assert roofline(name).prefill_flops(even(16, 4096, 1)) / 1e12 == pytest.approx(tflop, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "cache_dtype", "seconds"),
    [
        ("llama-3.1-8b", torch.bfloat16, 12.85),
        ("qwen3-0.6b", torch.bfloat16, 5.14),
        ("qwen3-0.6b", torch.float8_e4m3fn, 2.86),
    ],
)
def test_floor_of_the_default_throughput(
    name: str, cache_dtype: torch.dtype, seconds: float
) -> None:
    model = roofline(name, cache_dtype)
    workload = Workload.random(256, (100, 1024), (100, 1024), model.config.vocab_size, seed=0)
    prefill, decode = model.prefill_seconds(workload), model.decode_seconds(workload)
    assert prefill is not None
    assert decode is not None
    assert prefill + decode == pytest.approx(seconds, rel=2e-3)


@pytest.mark.parametrize("window", [None, 1, 5, 9, 100])
def test_tokens_seen_are_counted_one_by_one(window: int | None) -> None:
    model = replace(roofline("qwen3-0.6b"), config=tiny(window))
    layer = 2 * 4 * (4 + 2) + 3 * 4 * 8  # 2 heads of 2, 1 KV head
    assert model.layer_weights == layer
    limit = window or 1000
    seen = sum(min(position + 1, limit) for length in (3, 9) for position in range(length))
    workload = Workload([[0] * 3, [0] * 9], [4, 2])
    assert model.prefill_flops(workload) == 2 * layer * 12 + 4 * 2 * 2 * seen
    contexts = [4, 5, 6, 10]  # three steps of the first and one of the second
    read = sum(min(context, limit) for context in contexts)
    assert model.decode_bytes(workload) == 3 * 2 * (layer + 5 * 4) + read * 2 * 2 * 2


def test_layers_may_differ_in_their_window() -> None:
    def read_and_seen(**changes: Any) -> tuple[int, int]:
        model = replace(roofline("qwen3-0.6b"), config=replace(tiny(5), **changes))
        num_bytes = model.step_bytes(step((1,), (20,)))
        assert num_bytes is not None
        flops = model.step_flops(step((4,), (20,), num_sampled=1))
        return num_bytes - model.step_weight_bytes, flops - 2 * (4 * model.layer_weights + 20)

    first, second = read_and_seen(), read_and_seen(sliding_window=None)
    both = read_and_seen(num_layers=2, full_attention_layers=frozenset({0}))
    assert both == (first[0] + second[0], first[1] + second[1])
    assert first[0] < second[0]


@pytest.mark.parametrize("window", [None, 1, 5, 9, 100])
def test_steps_of_a_workload_add_up_to_it(window: int | None) -> None:
    """Prompts of 3 and 9 tokens, the second in two chunks, then 3 decode steps."""
    model = replace(roofline("qwen3-0.6b"), config=tiny(window))
    workload = Workload([[0] * 3, [0] * 9], [4, 4])
    prefills = [step((3, 4), (3, 4), num_sampled=1), step((5,), (9,))]
    head = 2 * 2 * 5 * 4  # of the two first tokens
    assert sum(map(model.step_flops, prefills)) == model.prefill_flops(workload) + head
    decodes = [step((1, 1), (3 + n, 9 + n)) for n in (1, 2, 3)]
    assert sum(map(model.step_bytes, decodes)) == model.decode_bytes(workload)


def test_a_chunk_reads_what_its_first_query_sees_on() -> None:
    def read(window: int | None) -> int:
        model = replace(roofline("qwen3-0.6b"), config=tiny(window))
        num_bytes = model.step_bytes(step((4,), (20,)))
        assert num_bytes is not None
        return (num_bytes - model.step_weight_bytes) // model.token_kv_bytes

    assert [read(window) for window in (None, 30, 20, 17, 16, 5, 1)] == [20, 20, 20, 20, 19, 8, 4]


def test_floor_of_a_step_is_the_longer_one() -> None:
    model = roofline("llama-3.1-8b")
    decode, prompt = step((1,), (100,)), step((4096,), (4096,))
    num_bytes = model.step_bytes(decode)
    assert num_bytes is not None
    assert model.step_seconds(decode) == num_bytes / COPY
    assert model.step_seconds(prompt) == model.step_flops(prompt) / MATMUL


def test_bytes_of_quantized_weights_are_not_known() -> None:
    model = replace(roofline("qwen3-0.6b"), is_quantized=True)
    assert model.step_bytes(step((1,), (9,))) is None
    assert model.step_seconds(step((1,), (9,))) is None


def test_without_ceilings_there_are_no_floors() -> None:
    model = Roofline.measure(tiny(None), torch.float32, torch.float32, torch.device("cpu"))
    assert model.decode_seconds(even(1, 2, 3)) is None
    assert model.prefill_seconds(even(1, 2, 3)) is None
    assert model.step_seconds(step((1,), (9,))) is None
    assert model.ceilings() == {}
    assert share(None, 1.0) is None
    assert share(1.0, 4.0) == 0.25


def step(
    query_lens: tuple[int, ...], seq_lens: tuple[int, ...], num_sampled: int | None = None
) -> StepRecord:
    sampled = len(query_lens) if num_sampled is None else num_sampled
    return StepRecord(query_lens, seq_lens, sampled, False, {}, Interval(0.0, 1.0))


def tiny(window: int | None) -> ModelConfig:
    config = load_model_config(resolve_model("qwen3-0.6b", "dummy"), model_class)
    return replace(
        config,
        hidden_size=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=8,
        vocab_size=5,
        sliding_window=window,
    )
