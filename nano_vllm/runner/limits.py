"""What a step may hold at the most, and in which dtype; without torch."""

from __future__ import annotations

from math import log2

from nano_vllm.config import HEAD_DIMS, EngineConfig, ModelConfig
from nano_vllm.gpus import GPU
from nano_vllm.model_size import activation_bytes

CPU_BATCHED_TOKENS = 2048
"""Tokens computed in one step by default, on a CPU."""
GPU_BATCHED_TOKENS = 2048, 8192
"""The same on a GPU, at least and at most."""
WEIGHT_READS = 32
"""Products of a step take so many times as long as reading their weights: what of that they do not
hide is a few hundredths of the step.
"""
ACTIVATION_SHARE = 1 / 32
"""Of a GPU's memory, for the activations of a step, where that many tokens are not asked for."""
LEAST_SKIPPED_TOKENS = 256
"""That must be left out of the last layer for it to be worth gathering the others: products of
fewer take a GPU about as long as those of one, as they read the same weights.
"""
MAX_GRAPH_TOKENS = 2048
"""Of a step with prompts that is a CUDA graph. The kernels of longer ones take longer than their
launches.
"""
DECODE_QUERIES = 8
"""Tokens of a sequence that the decode kernel takes on sm_90, in one row."""


def choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of a sequence: as told, else the model's context; ValueError beyond that."""
    scaling = model.rope_scaling
    limit = model.max_position
    stretches = scaling is not None and scaling.kind in ("linear", "dynamic", "yarn")
    if scaling is not None and stretches and scaling.original_max_position:
        limit = max(limit, int(scaling.original_max_position * scaling.factor))
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len must be at most the model's context of {limit}, "
            f"got {config.max_model_len}"
        )
    return config.max_model_len


def choose_max_num_batched_tokens(
    config: EngineConfig, max_model_len: int, model: ModelConfig, itemsize: int, gpu: GPU | None
) -> int:
    """Tokens of a step: as told, else what keeps the device busy; without chunked prefill a whole
    sequence at least.

    Args:
        config: tells them, maybe.
        max_model_len: tokens of a sequence.
        model: the decoder's shape, of all ranks together.
        itemsize: bytes of an element of weights and activations.
        gpu: None for a CPU.
    """
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    tokens = CPU_BATCHED_TOKENS
    if gpu is not None:
        tokens = saturating_batch(gpu, activation_bytes(model, itemsize))
    return max(tokens, 0 if config.enable_chunked_prefill else max_model_len)


def saturating_batch(gpu: GPU, token_bytes: int) -> int:
    """Tokens of a step that is bound by the GPU's arithmetic: a power of two.

    By the roofline, a product of n tokens with a matrix takes as long as reading the matrix where
    n = ridge, whatever the matrix: 2 * n operations for each element, which has 2 bytes. A float32
    has twice the bytes and is multiplied half as fast.

    Args:
        gpu: its rates, and its memory.
        token_bytes: of the activations of a token.
    """
    least, most = GPU_BATCHED_TOKENS
    ridge = gpu.matmul / gpu.copy
    tokens = min(max(1 << round(log2(WEIGHT_READS * ridge)), least), most)
    while tokens > least and tokens * token_bytes > ACTIVATION_SHARE * gpu.memory:
        tokens //= 2
    return tokens


def choose_dtype_name(name: str, stored: str | None, device: str) -> str:
    """The dtype asked for by name; for auto the checkpoint's own, if it names one."""
    if name == "auto":
        # A GGUF does not say. Its scales are float16, and bfloat16 would round the weights eight
        # times as coarsely.
        name = stored or ("float16" if device == "cuda" else "float32")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {name!r}")
    return name


def check_head_dim(model: ModelConfig, device: str) -> None:
    """ValueError where the attention kernels are not built for the model's heads."""
    if device == "cuda" and model.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))} on CUDA, "
            f"got {model.head_dim}"
        )
