"""How many KV blocks fit into the memory at hand."""

from __future__ import annotations

import os

import torch

from nano_vllm.cache.kv_cache import bytes_per_block
from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.runner.cuda_graphs import MAX_GRAPH_TOKENS
from nano_vllm.sampling.logprobs import ROWS_AT_ONCE

LOGPROB_ROWS = 256
"""Prompt positions whose logits exist at the same time, for prompt_logprobs."""
CPU_CONTEXTS = 4
"""Full contexts that the KV cache holds by default on a CPU."""


def num_kv_blocks(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    max_num_batched_tokens: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Blocks of the pool: as told, else what kv_cache_memory holds, else by the device's free
    memory.

    Call it once the weights are loaded: the pool is the last to take memory.
    """
    block_bytes = bytes_per_block(model, config.block_size, cache_dtype)
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory is not None:
        memory = config.kv_cache_memory
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserve = _activation_bytes(config, model, max_model_len, max_num_batched_tokens, dtype)
        memory = int(free - (1 - config.gpu_memory_utilization) * total) - reserve
        if memory < block_bytes:
            raise ValueError(
                f"no memory is left for the KV cache: {free / 2**30:.2f} GiB of "
                f"{total / 2**30:.2f} GiB are free behind the weights, activations need "
                f"{reserve / 2**30:.2f} GiB, and gpu_memory_utilization is "
                f"{config.gpu_memory_utilization}"
            )
    else:
        context = -(-max_model_len // config.block_size) * block_bytes
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = max(context, min(CPU_CONTEXTS * context, physical // 8))
    blocks = memory // block_bytes
    if blocks < 1:
        raise ValueError(
            f"kv_cache_memory must hold at least one block of {block_bytes} bytes, got {memory}"
        )
    return blocks


def num_host_blocks(config: EngineConfig, model: ModelConfig, cache_dtype: torch.dtype) -> int:
    """Blocks in host memory that host_cache_memory holds; ValueError where it is less than one, or
    nothing could be found there.
    """
    if config.host_cache_memory is None:
        return 0
    if not config.enable_prefix_caching:
        raise ValueError(
            f"host_cache_memory needs enable_prefix_caching, got {config.host_cache_memory}"
        )
    block_bytes = bytes_per_block(model, config.block_size, cache_dtype)
    if config.host_cache_memory < block_bytes:
        raise ValueError(
            f"host_cache_memory must hold at least one block of {block_bytes} bytes, "
            f"got {config.host_cache_memory}"
        )
    return config.host_cache_memory // block_bytes


def _activation_bytes(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    max_num_batched_tokens: int,
    dtype: torch.dtype,
) -> int:
    """Upper bound of what a step allocates beside weights and cache.

    Per token: the residual stream, a layer's input and output, and its widest intermediate
    (queries, keys, values and attention output, or gate, up and their product). Per sampled row:
    logits, in the model's dtype and adjusted, in float32; and what the sequence has said. For
    log-probabilities: logits of a part of a prompt, and some rows in float64. Half as much again
    for the allocator's rounding.
    """
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = (
        4 * model.hidden_size + max(attention, 3 * model.intermediate_size)
    ) * dtype.itemsize
    per_row = model.vocab_size * (dtype.itemsize + 4) + max_model_len * 4
    bound = max_num_batched_tokens * per_token + config.max_num_seqs * per_row
    bound += model.vocab_size * (LOGPROB_ROWS * dtype.itemsize + ROWS_AT_ONCE * 3 * 8)
    reserve = 256 * 2**20
    if not config.enforce_eager:
        # Graphs have memory of their own, which they share, and the driver's for their nodes.
        tokens = min(max_num_batched_tokens, MAX_GRAPH_TOKENS)
        rows = config.max_num_seqs
        bound += max(tokens * per_token, rows * (per_token + model.vocab_size * dtype.itemsize))
        reserve += 256 * 2**20
    return int(1.5 * bound) + reserve
