"""Random inputs of one attention call, paged and, for peers without pages, dense."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from nano_vllm.bench.attention_grid import AttentionShape, Heads

WORKSPACES = 2**30


@dataclass
class AttentionInputs:
    """One input set; the dense copies hold the same keys and values and are made when asked for."""

    shape: AttentionShape
    heads: Heads
    block_size: int
    device: torch.device
    dtype: torch.dtype
    query: torch.Tensor = field(init=False)  # [query_tokens, num_heads, head_dim]
    # [2, num_blocks, num_kv_heads, block_size, head_dim]: keys, values
    pool: torch.Tensor = field(init=False)
    # [num_seqs, max_blocks], int32: blocks in random order, no block twice, then zeros
    block_tables: torch.Tensor = field(init=False)
    query_start_loc: torch.Tensor = field(init=False)  # [num_seqs + 1], int32
    seq_lens: torch.Tensor = field(init=False)  # [num_seqs], int32

    def __post_init__(self) -> None:
        shape, heads, device = self.shape, self.heads, self.device
        self.query = self._random(shape.query_tokens, heads.num_heads, heads.head_dim)
        counts = self.block_counts
        self.pool = self._random(
            2, sum(counts), heads.num_kv_heads, self.block_size, heads.head_dim
        )
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        blocks = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
        for table, own in zip(tables, blocks, strict=True):
            table[: len(own)] = own
        self.block_tables = tables.to(device)
        starts = torch.tensor((0, *shape.query_lens)).cumsum(0)
        self.query_start_loc = starts.to(device, torch.int32)
        self.seq_lens = torch.tensor(shape.seq_lens, dtype=torch.int32, device=device)

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)

    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Of `ops.paged_attention` behind `out`, the tensors ..."""
        keys, values = self.pool.transpose(2, 3)
        return (
            self.query,
            keys,
            values,
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
        )

    def options(self) -> dict[str, Any]:
        """... and the rest."""
        return {
            "max_query_len": self.shape.query_len,
            "max_seq_len": max(self.shape.seq_lens),
            "scale": self.scale,
        }

    @property
    def scale(self) -> float:
        return self.heads.head_dim**-0.5

    @property
    def block_counts(self) -> list[int]:
        return [-(-length // self.block_size) for length in self.shape.seq_lens]

    @property
    def batched_query(self) -> torch.Tensor:
        """[num_seqs, query_len, num_heads, head_dim]."""
        return self.query.view(-1, self.shape.query_len, *self.query.shape[1:])

    def with_float8_cache(self) -> AttentionInputs:
        """The same inputs over a cache of one byte an element."""
        other = copy(self)
        other.pool = self.pool.to(torch.float8_e4m3fn)
        return other

    @cached_property
    def dense_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sequences of one length: [num_seqs, num_kv_heads, seq_len, head_dim]
        each.
        """
        assert self.shape.is_even
        size = (self.heads.num_kv_heads, self.shape.seq_lens[0], self.heads.head_dim)
        caches = self.pool.new_empty(2, len(self.shape.seq_lens), *size)
        for s in range(len(self.shape.seq_lens)):
            caches[:, s] = self._tokens(s)
        return caches[0], caches[1]

    @cached_property
    def packed_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all sequences end to end: [total, num_kv_heads, head_dim] each."""
        size = (sum(self.shape.seq_lens), self.heads.num_kv_heads, self.heads.head_dim)
        caches = self.pool.new_empty(2, *size)
        parts = caches.split(list(self.shape.seq_lens), dim=1)
        for s, part in enumerate(parts):
            part.copy_(self._tokens(s).transpose(1, 2))
        return caches[0], caches[1]

    def _tokens(self, s: int) -> torch.Tensor:
        """Keys and values of sequence s: [2, num_kv_heads, seq_len, head_dim]."""
        blocks = self.pool[:, self.block_tables[s, : self.block_counts[s]].long()]
        return blocks.transpose(1, 2).flatten(2, 3)[:, :, : self.shape.seq_lens[s]]


def bytes_needed(shape: AttentionShape, heads: Heads, itemsize: int, sets: int) -> tuple[int, int]:
    """What so many input sets take: with paged caches alone, outputs, their comparison and
    workspaces included, and on top for dense copies.
    """
    query = shape.query_tokens * heads.num_heads * heads.head_dim
    cache = shape.kv_bytes(heads, itemsize)
    compared = 4 * query * 4  # float32
    return sets * (cache + 2 * query * itemsize) + compared + WORKSPACES, sets * cache
