"""How many tokens a step holds by default: by the roofline of the GPU, and by its memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.gpus import GIB, GPU, GPUS, NVLINK_4, gpu_of
from nano_vllm.model_size import activation_bytes
from nano_vllm.models.registry import model_family
from nano_vllm.runner.limits import choose_max_num_batched_tokens, saturating_batch
from nano_vllm.weights.model_config import load_model_config
from nano_vllm.weights.resolve import resolve_model

LLAMA_405B = ModelConfig(
    "LlamaForCausalLM", 128256, 16384, 53248, 126, 128, 8, 128, 131072, 1e-5, 5e5, dtype="bfloat16"
)


def model_of(name: str) -> ModelConfig:
    return load_model_config(resolve_model(name, "dummy", with_weights=False), model_family)


def chosen(model: ModelConfig, gpu: GPU | None, max_model_len: int = 4096, **options: int) -> int:
    config = EngineConfig(**options)  # type: ignore[arg-type]
    return choose_max_num_batched_tokens(config, max_model_len, model, 2, gpu)


@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama-3.2-1b", "qwen3-8b", "llama-3.1-8b"])
@pytest.mark.parametrize(
    ("gpu", "tokens"),
    [
        ("h100", 8192),
        ("h200", 8192),
        ("a100-80gb", 4096),
        ("a100-40gb", 4096),
        ("l40s", 8192),
        ("rtx-4090", 4096),
    ],
)
def test_known_models_on_known_gpus(model: str, gpu: str, tokens: int) -> None:
    assert chosen(model_of(model), GPUS[gpu]) == tokens


def test_on_a_cpu_there_are_no_figures() -> None:
    assert chosen(LLAMA_405B, None) == chosen(model_of("qwen3-0.6b"), None) == 2048


def test_an_option_counts_before_all() -> None:
    for gpu in (None, GPUS["h100"]):
        assert chosen(LLAMA_405B, gpu, max_num_batched_tokens=77) == 77


def test_without_chunked_prefill_a_sequence_fits() -> None:
    config = EngineConfig(enable_chunked_prefill=False)
    for gpu in (None, GPUS["h100"]):
        for max_model_len in (100, 20_000):
            tokens = choose_max_num_batched_tokens(config, max_model_len, LLAMA_405B, 2, gpu)
            assert tokens == max(max_model_len, chosen(LLAMA_405B, gpu))


def test_arithmetic_that_is_dear_to_feed_takes_longer_steps() -> None:
    """Reading the weights is a few hundredths of a step's products, but for the bounds."""
    found = []
    for ridge in range(8, 1000):
        gpu = GPU("any", 80 * GIB, 1e12, ridge * 1e12, NVLINK_4)
        found.append(saturating_batch(gpu, 1000))
        if 2048 < found[-1] < 8192:
            assert 0.7 / 32 < ridge / found[-1] < 1.42 / 32
    assert set(found) == {2048, 4096, 8192}
    assert all(fewer <= more for fewer, more in pairwise(found))


def test_activations_leave_the_memory_to_the_cache() -> None:
    h100 = GPUS["h100"]
    assert chosen(LLAMA_405B, h100) == 4096
    assert chosen(LLAMA_405B, GPUS["h200"]) == 8192
    token_bytes = activation_bytes(LLAMA_405B, 2)
    for gib in range(1, 400):
        gpu = replace(h100, memory=gib * GIB)
        tokens = saturating_batch(gpu, token_bytes)
        assert tokens == 2048 or tokens * token_bytes * 32 <= gpu.memory
        assert tokens == 8192 or 2 * tokens * token_bytes * 32 > gpu.memory


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GH200 480GB", "h100"),  # not known
        ("Tesla T4", "h100"),
    ],
)
def test_a_gpu_by_the_name_that_its_driver_has_for_it(device_name: str, name: str) -> None:
    assert gpu_of(device_name, 7 * GIB) == replace(GPUS[name], memory=7 * GIB)
