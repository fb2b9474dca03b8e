"""Turns a batch into the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nano_vllm import ops
from nano_vllm._core import find_shared_prefixes, prepare_batch
from nano_vllm.batch import Batch
from nano_vllm.config import ModelConfig
from nano_vllm.layers.attention import AttentionMetadata

SHARED_PREFIX_BYTES = 32 << 20
"""Of keys and values of a layer that reading a prefix once must spare: 11 us of memory time on an
H100, about what the kernel that reads it costs besides."""


@dataclass(slots=True)
class ModelInput:
    """One step's input, on the device."""

    input_ids: torch.Tensor
    """[num_tokens], int64."""
    positions: torch.Tensor
    """[num_tokens], int64."""
    attention: AttentionMetadata


class InputBatch:
    """Staging buffers of fixed size: a step is written by C++ into one host buffer and travels in
    one copy.

    Args:
        config: the decoder's shape.
        max_num_tokens: tokens of a step at the most.
        max_num_seqs: sequences of a step at the most.
        max_blocks_per_seq: blocks of a sequence at the most.
        block_size: tokens per block.
        device: where the tensors go.
        shares_prefixes: look for sequences that begin with the same blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_num_tokens: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        block_size: int,
        device: torch.device,
        shares_prefixes: bool = False,
    ) -> None:
        self._config = config
        self._shares_prefixes = shares_prefixes and device.type == "cuda"
        self._min_saved_tokens = SHARED_PREFIX_BYTES // (4 * config.num_kv_heads * config.head_dim)
        self.block_size = block_size
        self.device = device
        self.max_blocks_per_seq = max_blocks_per_seq
        capacity = (
            3 * 8 * max_num_tokens
            + 4 * (4 * max_num_seqs + 1)
            + 4 * max_num_seqs * max_blocks_per_seq
        )
        self._on_gpu = device.type == "cuda"
        self._staging = torch.empty(capacity, dtype=torch.uint8, pin_memory=self._on_gpu)
        self._buffer = (
            torch.empty_like(self._staging, device=device) if self._on_gpu else self._staging
        )
        self._block_tables = torch.zeros(
            (max_num_seqs, max_blocks_per_seq), dtype=torch.int32, device=device
        )
        """Of padded batches, whose tensors must not move."""
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._workspaces: dict[int, torch.Tensor] = {}
        """By the sliding windows of the layers, which need a plan each."""
        if self._on_gpu:
            numel = ops.paged_attention_workspace_numel(
                max_num_seqs, config.num_heads, config.head_dim
            )
            self._workspaces = {
                window: torch.empty(numel, dtype=torch.float32, device=device)
                for window in config.windows()
            }

    def prepare(
        self,
        batch: Batch,
        padded_size: int | None = None,
        begin: Callable[[], None] | None = None,
    ) -> ModelInput:
        """Fill the staging buffer from the batch and send it to the device. Tokens that are not
        known yet, of a batch scheduled ahead, are 0.

        Args:
            batch: what to compute.
            padded_size: for a batch of decodes, sequences to pad it to with ones that have nothing
                to do. Batches of a padded size have their tensors always in the same memory, and
                bounds that hold for all of them.
            begin: called where the host's part is done and the device's begins.
        """
        scheduled = batch.scheduled
        num_tokens, num_seqs = batch.num_tokens, len(scheduled)
        padded_tokens, padded_seqs = padded_size or num_tokens, padded_size or num_seqs
        width = max(len(s.sequence.block_table) for s in scheduled)
        if self._copied is not None:
            # the copy of the step before may still read the staging buffer
            self._copied.synchronize()

        layout = (
            (torch.int64, (padded_tokens,)),
            (torch.int64, (padded_tokens,)),
            (torch.int64, (padded_tokens,)),
            (torch.int32, (padded_seqs + 1,)),
            (torch.int32, (padded_seqs,)),
            (torch.int32, (2, padded_seqs)),
            (torch.int32, (num_seqs, width)),
        )
        host, device = [], []
        offset = 0
        for dtype, shape in layout:
            end = offset + dtype.itemsize * torch.Size(shape).numel()
            host.append(self._staging[offset:end].view(dtype).view(shape).numpy())
            device.append(self._buffer[offset:end].view(dtype).view(shape))
            offset = end
        token_ids = [s.sequence.token_ids for s in scheduled]
        for tokens in token_ids if batch.lead else ():
            tokens.append(0)  # stands for the token to come, for the length of this call
        try:
            max_query_len, max_seq_len = prepare_batch(
                token_ids,
                [s.sequence.block_table for s in scheduled],
                [s.sequence.num_computed_tokens + batch.lead for s in scheduled],
                [s.num_tokens for s in scheduled],
                self.block_size,
                host[0][:num_tokens],
                host[1][:num_tokens],
                host[2][:num_tokens],
                host[3][: num_seqs + 1],
                host[4][:num_seqs],
                host[6],
            )
        finally:
            for tokens in token_ids if batch.lead else ():
                tokens.pop()
        is_shared = self._shares_prefixes and find_shared_prefixes(
            host[3][: num_seqs + 1],
            host[4][:num_seqs],
            host[6],
            self.block_size,
            self._min_saved_tokens,
            host[5][:, :num_seqs],
        )
        if padded_size is not None:
            for array, value in zip(host[:3], (0, 0, -1), strict=True):
                array[num_tokens:] = value
            host[3][num_seqs + 1 :] = num_tokens
            host[4][num_seqs:] = 0
            host[5][:, num_seqs:] = 0
        if begin is not None:
            begin()
        if self._copied is not None:
            self._buffer[:offset].copy_(self._staging[:offset], non_blocking=True)
            self._copied.record()
        input_ids, positions, slot_mapping, query_start_loc, seq_lens = device[:5]
        shared_prefix, block_tables = device[5] if is_shared else None, device[6]
        if padded_size is not None:
            self._block_tables[:num_seqs, :width] = block_tables
            block_tables = self._block_tables[:padded_size]
            max_seq_len = self.max_blocks_per_seq * self.block_size
        for window, workspace in self._workspaces.items():
            ops.plan_attention(
                workspace,
                query_start_loc,
                seq_lens,
                num_heads=self._config.num_heads,
                num_kv_heads=self._config.num_kv_heads,
                head_dim=self._config.head_dim,
                max_query_len=max_query_len,
                sliding_window=window,
                shared_prefix=shared_prefix,
            )
        return ModelInput(
            input_ids,
            positions,
            AttentionMetadata(
                slot_mapping,
                block_tables,
                query_start_loc,
                seq_lens,
                max_query_len,
                max_seq_len,
                self._workspaces,
                shared_prefix,
            ),
        )
