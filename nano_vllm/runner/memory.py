"""How many KV blocks fit into the memory at hand: arithmetic, without device and torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.model_size import activation_bytes, bytes_per_block, rotary_table_bytes
from nano_vllm.runner.graph_shapes import usual_shapes
from nano_vllm.runner.input_layout import staging_bytes
from nano_vllm.runner.limits import MAX_GRAPH_TOKENS
from nano_vllm.sampling.logprob_rows import PROMPT_ROWS, ROWS_AT_ONCE

CPU_CONTEXTS = 4
"""Full contexts that the KV cache holds by default on a CPU."""
_ROUNDING = 1.5
"""What the allocator may take for what was asked of it."""
_RESERVE = 256 << 20
_GRAPH_BYTES = 40 << 10
"""Of a CUDA graph's nodes, for each layer: some 1 MB were measured of models with 28 and 32."""


class DeviceMemory(NamedTuple):
    """Of a GPU, in bytes, as the driver tells."""

    free: int
    total: int


class StepMemory(NamedTuple):
    """Upper bounds of what a step allocates beside weights and cache, in bytes."""

    activations: int
    graphs: int
    """The same again for CUDA graphs, whose memory is their own; and the nodes of all that usual
    steps have, captured ahead of need or not.
    """


def num_kv_blocks(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    max_num_batched_tokens: int,
    itemsize: int,
    cache_itemsize: int,
    memory: DeviceMemory | None,
) -> int:
    """Blocks of the pool: as told, else what kv_cache_memory holds, else by the device's free
    memory.

    Args:
        config: tells memory, lengths and sizes of steps.
        model: the decoder's shape, or that of a rank's share.
        max_model_len: tokens of a sequence.
        max_num_batched_tokens: tokens of a step.
        itemsize: bytes of an element of weights and activations.
        cache_itemsize: bytes of an element of keys and values.
        memory: of the GPU once the weights are loaded: the pool is the last to take memory. None
            for a CPU.
    """
    block_bytes = bytes_per_block(model, config.block_size, cache_itemsize)
    total = _physical_bytes() if memory is None else memory.total
    if config.num_blocks is not None:
        _check_room("num_blocks", config.num_blocks, config.num_blocks * block_bytes, total)
        return config.num_blocks
    if config.kv_cache_memory is not None:
        pool = config.kv_cache_memory
        _check_room("kv_cache_memory", pool, pool, total)
    elif memory is not None:
        reserve = sum(step_memory(config, model, max_model_len, max_num_batched_tokens, itemsize))
        pool = kv_pool_bytes(config, memory, reserve)
        if pool < block_bytes:
            raise ValueError(
                f"no memory is left for the KV cache: {memory.free / 2**30:.2f} GiB of "
                f"{memory.total / 2**30:.2f} GiB are free behind the weights, activations need "
                f"{reserve / 2**30:.2f} GiB, and gpu_memory_utilization is "
                f"{config.gpu_memory_utilization}"
            )
    else:
        context = -(-max_model_len // config.block_size) * block_bytes
        pool = max(context, min(CPU_CONTEXTS * context, total // 8))
    blocks = pool // block_bytes
    if blocks < 1:
        raise ValueError(
            f"kv_cache_memory must hold at least one block of {block_bytes} bytes, got {pool}"
        )
    return blocks


def kv_pool_bytes(config: EngineConfig, memory: DeviceMemory, reserve: int) -> int:
    """What of a GPU's free memory the pool gets, with so much reserved for steps; below 0 where
    that does not fit.
    """
    return int(memory.free - (1 - config.gpu_memory_utilization) * memory.total) - reserve


def num_host_blocks(config: EngineConfig, model: ModelConfig, cache_itemsize: int) -> int:
    """Blocks in host memory that host_cache_memory holds; ValueError where it is less than one, or
    nothing could be found there.
    """
    if config.host_cache_memory is None:
        return 0
    if not config.enable_prefix_caching:
        raise ValueError(
            f"host_cache_memory needs enable_prefix_caching, got {config.host_cache_memory}"
        )
    block_bytes = bytes_per_block(model, config.block_size, cache_itemsize)
    if config.host_cache_memory < block_bytes:
        raise ValueError(
            f"host_cache_memory must hold at least one block of {block_bytes} bytes, "
            f"got {config.host_cache_memory}"
        )
    _check_room(
        "host_cache_memory", config.host_cache_memory, config.host_cache_memory, _physical_bytes()
    )
    return config.host_cache_memory // block_bytes


def _physical_bytes() -> int:
    """Of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_room(name: str, value: int, num_bytes: int, total: int) -> None:
    if num_bytes > total:
        raise ValueError(
            f"{name} = {value} takes {num_bytes / 2**30:.2f} GiB, there are {total / 2**30:.2f}"
        )


def step_memory(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    max_num_batched_tokens: int,
    itemsize: int,
) -> StepMemory:
    """What activations and graphs may take.

    Per token: `activation_bytes`. Per sampled row: logits, in the model's dtype and adjusted, in
    float32; and what the sequence has said. For log-probabilities: logits of a part of a prompt,
    and some rows in float64.
    """
    per_token = activation_bytes(model, itemsize)
    per_row = model.vocab_size * (itemsize + 4) + max_model_len * 4
    bound = max_num_batched_tokens * per_token + config.max_num_seqs * per_row
    bound += model.vocab_size * (PROMPT_ROWS * itemsize + ROWS_AT_ONCE * 3 * 8)
    activations = int(_ROUNDING * bound) + _RESERVE
    if config.enforce_eager:
        return StepMemory(activations, 0)
    tokens = min(max_num_batched_tokens, MAX_GRAPH_TOKENS)
    rows = config.max_num_seqs
    bound = max(tokens * per_token, rows * (per_token + model.vocab_size * itemsize))
    shapes = usual_shapes(
        max_num_batched_tokens,
        rows,
        config.enable_cascade_attention,
        spreads_chunks=True,  # where the GPU can
        most_seqs=rows,
    )
    nodes = len(shapes) * model.num_layers * _GRAPH_BYTES
    return StepMemory(activations, int(_ROUNDING * bound) + nodes)


def fixed_bytes(
    config: EngineConfig, model: ModelConfig, max_model_len: int, max_num_batched_tokens: int
) -> int:
    """What lies on a GPU beside weights and pool from the beginning: rotary tables, the inputs of a
    step with two sets of block tables, the workspaces of attention.
    """
    seqs = config.max_num_seqs
    blocks = -(-max_model_len // config.block_size)
    inputs = staging_bytes(max_num_batched_tokens, seqs, blocks) + 2 * seqs * blocks * 4
    workspace = attention_workspace_numel(seqs, model.num_heads, model.head_dim) * 4
    return rotary_table_bytes(model, max_model_len) + inputs + len(model.windows()) * workspace


def attention_workspace_numel(num_seqs: int, num_heads: int, head_dim: int) -> int:
    """`ops.paged_attention_workspace_numel`, which needs torch: the numbers are those of
    csrc/attention/paged_attention.h.
    """
    rows = num_seqs * num_heads
    split_rows = max(rows * 16, 288 * 32 * 16)
    prefix_rows = max(rows, 288 // 2 * 192)
    return 4096 + (num_seqs + 1) * 14 + (split_rows + prefix_rows) * (head_dim + 2)
