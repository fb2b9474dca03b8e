"""Batches of sequences over a poisoned paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nano_vllm import ops
from nano_vllm.runner.model_worker import READ_BEHIND_WINDOW
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import FLOAT8, SENTINEL, Draw

CACHE_LAYOUTS = ("tokens first", "heads first", "keys beside values", "odd")


@dataclass
class HeadShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass
class CachedSequence:
    """What a sequence's tokens are, wherever they lie: the last query belongs to the last token."""

    query: torch.Tensor  # [query_len, num_heads, head_dim]
    keys: torch.Tensor  # [seq_len, num_kv_heads, head_dim]
    values: torch.Tensor  # [seq_len, num_kv_heads, head_dim]


def draw_sequence(
    draw: Draw, query_len: int, seq_len: int, heads: HeadShape, dtype: torch.dtype
) -> CachedSequence:
    shape = (seq_len, heads.num_kv_heads, heads.head_dim)
    return CachedSequence(
        draw.normal(query_len, heads.num_heads, heads.head_dim, dtype=dtype),
        draw.normal(*shape, dtype=dtype),
        draw.normal(*shape, dtype=dtype),
    )


@dataclass
class AttentionBatch:
    """The arguments of `paged_attention`; query rows past query_start_loc[-1] are padding."""

    draw: Draw
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    options: dict[str, Any]

    def arguments(self) -> tuple[torch.Tensor, ...]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
        )

    def run(self, out_layout: str | None = None) -> torch.Tensor:
        """Runs the op into poisoned memory; checks that it wrote its rows and nothing else."""
        num_tokens = int(self.query_start_loc[-1])
        out = self.draw.output(*self.query.shape, dtype=self.query.dtype, layout=out_layout)
        out[num_tokens:] = SENTINEL
        workspace = self.workspace() if self.draw.device == "cuda" else None
        inputs = [tensor.clone() for tensor in self.arguments()]
        is_planned = self.draw.choice((False, True))
        if is_planned and workspace is not None:
            self.plan(workspace)
        ops.paged_attention(
            out, *self.arguments(), **self.options, workspace=workspace, is_planned=is_planned
        )
        assert_gaps_untouched(out)
        assert_equal_bits(out[num_tokens:], torch.full_like(out[num_tokens:], SENTINEL))
        if workspace is not None:
            assert_gaps_untouched(workspace)
        for before, after in zip(inputs[:3], self.arguments()[:3], strict=True):
            assert_equal_bits(after, before)
        return out[:num_tokens]

    def check(self) -> None:
        """Compares with the reference; on a GPU also the kernels of sm_80 and newer on sm_90, which
        refuses its own to an odd `out`.
        """
        expected = self.expected()
        assert_close(self.run(), expected)
        if self.draw.device == "cuda":
            assert_close(self.run("odd"), expected)

    def plan(self, workspace: torch.Tensor) -> None:
        _, num_heads, head_dim = self.query.shape
        ops.plan_attention(
            workspace,
            self.query_start_loc,
            self.seq_lens,
            num_heads=num_heads,
            num_kv_heads=self.key_cache.shape[2],
            head_dim=head_dim,
            max_query_len=self.options["max_query_len"],
            min_query_len=self.options["min_query_len"],
            sliding_window=self.options.get("sliding_window", 0),
            shared_prefix=self.options.get("shared_prefix"),
        )

    def workspace(self) -> torch.Tensor:
        """Exactly as long as asked for, NaN, with the sentinel around it."""
        needed = ops.paged_attention_workspace_numel(
            self.seq_lens.shape[0], self.query.shape[1], self.query.shape[2]
        )
        return self.draw.output(needed, dtype=torch.float32, layout="aligned")

    def expected(self) -> torch.Tensor:
        """In float64."""
        out = torch.empty_like(self.query, dtype=torch.float64)
        reference.paged_attention(out, *self.arguments(), **self.options)
        return out[: int(self.query_start_loc[-1])]


def page(
    draw: Draw,
    sequences: list[CachedSequence],
    block_size: int,
    *,
    cache_layout: str | None = None,
    query_layout: str | None = None,
    float8: bool = False,
    has_all_blocks: bool = False,
    **options: Any,
) -> AttentionBatch:
    """Lays the sequences out on randomly chosen blocks.

    All that no query may see is NaN: rows past a sequence's end, blocks of nobody, padding queries,
    gaps between the strides. Block table entries past a sequence's last block, and those of blocks
    behind what may be read for the sliding window of all its queries, unless it has all, name a
    block of nobody or no block at all. The bounds of query_lens and seq_lens are often loose. A
    float8 cache often has scales, if not the given ones.
    """
    query = torch.cat([sequence.query for sequence in sequences])
    _, num_kv_heads, head_dim = sequences[0].keys.shape
    query_lens = [len(sequence.query) for sequence in sequences]
    seq_lens = [len(sequence.keys) for sequence in sequences]
    needed = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(needed) + draw.between(1, 4)
    width = max(needed) + draw.between(0, 2)

    blocks = torch.tensor(draw.sample(num_blocks, num_blocks), device=draw.device)
    unused = torch.tensor([0, 2**31 - 1, -1, -(2**31)], device=draw.device)
    unused[0] = blocks[-1]
    tables = unused[draw.integers(0, 3, len(sequences), width, dtype=torch.int64)]
    rows = torch.arange(block_size, device=draw.device)
    slots = []
    for s, own in enumerate(blocks[: sum(needed)].split(needed)):
        window = options.get("sliding_window") or seq_lens[s]
        window += READ_BEHIND_WINDOW if draw.device == "cuda" else 0
        behind = max(seq_lens[s] - query_lens[s] + 1 - window, 0) // block_size
        if has_all_blocks:
            behind = 0
        tables[s, behind : len(own)] = own[behind:]
        slots.append((own[:, None] * block_size + rows).flatten()[: seq_lens[s]])

    for name in ("k_scale", "v_scale") if float8 else ():
        if name not in options and draw.choice((True, True, False)):
            options[name] = draw.scales(num_kv_heads)
    keys = torch.full((num_blocks, block_size, num_kv_heads, head_dim), torch.nan)
    keys = keys.to(draw.device, FLOAT8 if float8 else query.dtype)
    values = keys.clone()
    at = torch.cat(slots)
    for cache, tokens, scale in (
        (keys, [sequence.keys for sequence in sequences], options.get("k_scale")),
        (values, [sequence.values for sequence in sequences], options.get("v_scale")),
    ):
        # bytes, as an index cannot write float8
        cache.flatten(0, 1).view(torch.uint8)[at] = _stored(torch.cat(tokens), scale, cache.dtype)
    key_cache, value_cache = _lay_out(
        draw, keys, values, cache_layout or draw.choice(CACHE_LAYOUTS)
    )

    padding = torch.full((draw.choice((0, 0, 1, 5)), *query.shape[1:]), torch.nan)
    max_query_len, max_seq_len = max(query_lens), max(seq_lens)
    min_query_len = draw.choice((0, min(query_lens)))
    if draw.choice((True, False)):
        max_query_len += draw.choice((0, 1, 17)) if max_query_len > 1 else 0
        max_seq_len = draw.between(max_seq_len, width * block_size)
    starts = [sum(query_lens[:s]) for s in range(len(sequences) + 1)]
    return AttentionBatch(
        draw,
        draw.strided(torch.cat((query, padding.to(query))), layout=query_layout),
        key_cache,
        value_cache,
        draw.strided(tables.int(), fill=-1),
        _int32(draw, starts),
        _int32(draw, seq_lens),
        {
            "max_query_len": max_query_len,
            "min_query_len": min_query_len,
            "max_seq_len": max_seq_len,
            "scale": head_dim**-0.5,
        }
        | options,
    )


def _int32(draw: Draw, values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=draw.device)


def _stored(tokens: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What a cache of the dtype holds of the tokens, as bytes."""
    if scale is not None:
        tokens = tokens / scale[:, None]
    if dtype == FLOAT8:
        tokens = tokens.clamp(-448, 448)
    return tokens.to(dtype).view(torch.uint8)


def _lay_out(
    draw: Draw, keys: torch.Tensor, values: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values, otherwise arranged in memory."""
    if layout == "tokens first":
        return keys, values
    if layout == "heads first":
        keys, values = (cache.transpose(1, 2).contiguous() for cache in (keys, values))
        return keys.transpose(1, 2), values.transpose(1, 2)
    if layout == "keys beside values":
        pool = torch.stack((keys, values), dim=1)
        return pool[:, 0], pool[:, 1]
    return draw.strided(keys, layout="odd"), draw.strided(values, layout="odd")
