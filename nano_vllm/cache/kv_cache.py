"""The tensors that hold keys and values."""

from __future__ import annotations

import torch

from nano_vllm.config import ModelConfig
from nano_vllm.layers.attention import LayerCache


class KVCache:
    """One pool of blocks for all layers.

    In memory a block of one layer's keys (or values) is dense and lies head by head, so that what
    one attention block of threads reads is contiguous; `layers` shows it in the order that the ops
    are documented in.

    Args:
        config: the decoder's shape.
        num_blocks: blocks of the pool.
        block_size: tokens per block.
        dtype: of keys and values.
        device: where the pool lives. It is left uninitialised; on a CPU, memory is taken as blocks
            are first used.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.pool = torch.empty(
            (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim),
            dtype=dtype,
            device=device,
        )
        """[num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]."""
        self.layers: list[LayerCache] = [
            (keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in self.pool
        ]
