"""Turns a batch into the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nano_vllm import ops
from nano_vllm._core import DecodeStep, find_shared_prefixes, prepare_batch
from nano_vllm.batch import Batch
from nano_vllm.config import ModelConfig
from nano_vllm.layers.attention import AttentionMetadata
from nano_vllm.runner.input_layout import (
    Layout,
    array_bytes,
    decode_layout,
    layout_bytes,
    mixed_layout,
    staging_bytes,
)

SHARED_PREFIX_BYTES = 32 << 20
"""Of keys and values of a layer that reading a prefix once must spare: 11 us of memory time on an
H100, about what the kernel that reads it costs besides."""

_DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "int32": (np.int32, torch.int32),
    "int64": (np.int64, torch.int64),
}
"""By their names in a Layout, for host and device."""
Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


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

    Of a step of decodes alone, the block tables travel as what has changed in them since the last
    such step: the device keeps those of all sequences that decode.

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
        self._shares_prefixes = shares_prefixes
        self._min_saved_tokens = SHARED_PREFIX_BYTES // (4 * config.num_kv_heads * config.head_dim)
        self.block_size = block_size
        self.device = device
        self.max_blocks_per_seq = max_blocks_per_seq
        capacity = staging_bytes(max_num_tokens, max_num_seqs, max_blocks_per_seq)
        on_gpu = device.type == "cuda"
        self._staging = torch.empty(capacity, dtype=torch.uint8, pin_memory=on_gpu)
        self._buffer = torch.empty_like(self._staging, device=device) if on_gpu else self._staging
        self._host = self._staging.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None
        self._decode_views: dict[int, tuple[Arrays, Tensors, int]] = {}
        """By size: `decode_layout` on host and device, and its bytes ahead of the changes."""
        tables = torch.zeros(
            (2, max_num_seqs, max_blocks_per_seq), dtype=torch.int32, device=device
        )
        self._tables, self._block_tables = tables
        """Block tables by table row; and of padded batches, whose tensors must not move."""
        self._sent = np.zeros((max_num_seqs, 2), dtype=np.int64)
        """What each table row holds: the id of a decode row, and how many of its blocks."""
        self._workspaces: dict[int, torch.Tensor] = {}
        """By the sliding windows of the layers, which need a plan each."""
        if on_gpu:
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
        padding: tuple[int, int] | None = None,
        begin: Callable[[], None] | None = None,
    ) -> ModelInput:
        """Fill the staging buffer from the batch and send it to the device. Tokens that are not
        known yet, of a batch scheduled ahead, are 0.

        Args:
            batch: what to compute.
            padding: tokens and sequences to pad it to, with sequences that have nothing to do, and,
                where it is not all decodes, tokens that belong to none. Batches of a padding have
                their tensors always in the same memory, and bounds that hold for all of them.
            begin: called where the host's part is done and the device's begins.
        """
        if self._copied is not None:
            # the copy of the step before may still read the staging buffer
            self._copied.synchronize()
        if batch.decodes is None or not batch.is_decode:
            return self._prepare_mixed(batch, padding, begin)
        try:
            padded_size = None if padding is None else padding[1]
            return self._prepare_decodes(batch.decodes, padded_size, begin)
        except BaseException:
            self._sent[:] = 0  # whether it has arrived is not known
            raise

    def _prepare_decodes(
        self, decodes: DecodeStep, padded_size: int | None, begin: Callable[[], None] | None
    ) -> ModelInput:
        size = padded_size or len(decodes)
        if size not in self._decode_views:
            views = self._views(decode_layout(size, size * self.max_blocks_per_seq))
            self._decode_views[size] = *views, layout_bytes(decode_layout(size, 0))
        host, device, num_bytes = self._decode_views[size]
        max_seq_len, num_changes, is_shared = self._write_decodes(decodes, host)
        self._send(num_bytes + num_changes * host["changes"].itemsize * 2, begin)
        if padded_size is not None:
            max_seq_len = self.max_blocks_per_seq * self.block_size
        block_tables = self._expand_tables(
            device["table_rows"], device["changes"][:num_changes], max_seq_len, padded_size
        )
        return self._model_input(device, block_tables, 1, max_seq_len, is_shared)

    def _write_decodes(self, decodes: DecodeStep, host: Arrays) -> tuple[int, int, bool]:
        """Fill the host's arrays.

        Returns:
            the greatest seq_len, how many changes there are, and whether prefixes are shared.
        """
        max_seq_len = decodes.write_inputs(
            host["input_ids"],
            host["positions"],
            host["slot_mapping"],
            host["query_start_loc"],
            host["seq_lens"],
        )
        num_changes = decodes.write_table_changes(
            self.max_blocks_per_seq, self._sent, host["table_rows"], host["changes"]
        )
        host["num_changes"][0] = num_changes
        is_shared = self._shares_prefixes and decodes.find_shared_prefixes(
            self._min_saved_tokens, host["shared_prefix"]
        )
        return max_seq_len, num_changes, bool(is_shared)

    def _expand_tables(
        self,
        table_rows: torch.Tensor,
        changes: torch.Tensor,
        max_seq_len: int,
        padded_size: int | None,
    ) -> torch.Tensor:
        """On the device: bring its block tables up to date, and give out those of the step."""
        if len(changes):
            places, blocks = changes.unbind(1)
            self._tables.view(-1).scatter_(0, places.long(), blocks)
        if padded_size is None:
            width = -(-max_seq_len // self.block_size)
            return self._tables[:, :width].index_select(0, table_rows)
        block_tables = self._block_tables[:padded_size]
        return torch.index_select(self._tables, 0, table_rows, out=block_tables)

    def _prepare_mixed(
        self, batch: Batch, padding: tuple[int, int] | None, begin: Callable[[], None] | None
    ) -> ModelInput:
        num_tokens, num_seqs, num_decodes = (
            batch.num_tokens,
            len(batch.scheduled),
            batch.num_decodes,
        )
        others = batch.scheduled[num_decodes:]
        width = max(len(s.sequence.block_table) for s in batch.scheduled)
        layout = mixed_layout(*(padding or (num_tokens, num_seqs)), (num_seqs, width))
        host, device = self._views(layout)
        max_decode_len = 0
        if batch.decodes is not None:
            max_decode_len = batch.decodes.write_inputs(
                host["input_ids"][:num_decodes],
                host["positions"][:num_decodes],
                host["slot_mapping"][:num_decodes],
                host["query_start_loc"][: num_decodes + 1],
                host["seq_lens"][:num_decodes],
            )
            batch.decodes.write_tables(host["block_tables"][:num_decodes])
        query_start_loc, seq_lens = host["query_start_loc"][: num_seqs + 1], host["seq_lens"]
        max_query_len, max_seq_len = prepare_batch(
            [s.sequence.token_ids for s in others],
            [s.sequence.block_table for s in others],
            [s.start for s in others],
            [s.num_tokens for s in others],
            self.block_size,
            host["input_ids"][num_decodes:num_tokens],
            host["positions"][num_decodes:num_tokens],
            host["slot_mapping"][num_decodes:num_tokens],
            query_start_loc[num_decodes:],
            seq_lens[num_decodes:num_seqs],
            host["block_tables"][num_decodes:],
        )
        query_start_loc[num_decodes:] += num_decodes
        is_shared = self._shares_prefixes and find_shared_prefixes(
            query_start_loc,
            seq_lens[:num_seqs],
            host["block_tables"],
            self.block_size,
            self._min_saved_tokens,
            host["shared_prefix"][:, :num_seqs],
        )
        max_seq_len = max(max_seq_len, max_decode_len)
        if padding is not None:
            for name, value in (("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
                host[name][num_tokens:] = value
            host["query_start_loc"][num_seqs + 1 :] = num_tokens
            seq_lens[num_seqs:] = 0
            host["shared_prefix"][:, num_seqs:] = 0
        self._send(layout_bytes(layout), begin)
        block_tables = device["block_tables"]
        if padding is not None:
            self._block_tables[:num_seqs, :width] = block_tables
            block_tables = self._block_tables[: padding[1]]
            max_query_len, max_seq_len = padding[0], self.max_blocks_per_seq * self.block_size
        return self._model_input(device, block_tables, max_query_len, max_seq_len, bool(is_shared))

    def _views(self, layout: Layout) -> tuple[Arrays, Tensors]:
        """The arrays of a layout in the staging buffer and in the one on the device."""
        host: Arrays = {}
        device: Tensors = {}
        offset = 0
        for name, (dtype, shape) in layout.items():
            end = offset + array_bytes(dtype, shape)
            on_host, on_device = _DTYPES[dtype]
            host[name] = self._host[offset:end].view(on_host).reshape(shape)
            device[name] = self._buffer[offset:end].view(on_device).view(shape)
            offset = end
        return host, device

    def _send(self, num_bytes: int, begin: Callable[[], None] | None) -> None:
        if begin is not None:
            begin()
        if self._copied is not None:
            self._buffer[:num_bytes].copy_(self._staging[:num_bytes], non_blocking=True)
            self._copied.record()

    def _model_input(
        self,
        device: Tensors,
        block_tables: torch.Tensor,
        max_query_len: int,
        max_seq_len: int,
        is_shared: bool,
    ) -> ModelInput:
        """What has been sent."""
        shared_prefix = device["shared_prefix"] if is_shared else None
        return ModelInput(
            device["input_ids"],
            device["positions"],
            AttentionMetadata(
                device["slot_mapping"],
                block_tables,
                device["query_start_loc"],
                device["seq_lens"],
                max_query_len,
                max_seq_len,
                self._workspaces,
                shared_prefix,
            ),
        )

    def plan(self, attention: AttentionMetadata) -> None:
        """Share out the attention's work; ahead of the layers, on the device."""
        for window, workspace in self._workspaces.items():
            ops.plan_attention(
                workspace,
                attention.query_start_loc,
                attention.seq_lens,
                num_heads=self._config.num_heads,
                num_kv_heads=self._config.num_kv_heads,
                head_dim=self._config.head_dim,
                max_query_len=attention.max_query_len,
                sliding_window=window,
                shared_prefix=attention.shared_prefix,
            )
