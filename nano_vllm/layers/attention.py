"""Attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nano_vllm import ops
from nano_vllm.layers.norm import RMSNorm

LayerCache = tuple[torch.Tensor, torch.Tensor]
"""Key and value cache of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""

CacheScales = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of a float8 cache's keys and values, each [num_kv_heads]; None for other caches."""


def cache_scale(num_kv_heads: int, held: range) -> torch.Tensor:
    """What the keys or values of a float8 cache are to be multiplied by, for each head that this
    rank holds; 1 unless the checkpoint brings it, for each head or for all.
    """
    scale = torch.ones(len(held), dtype=torch.float32)
    scale.weight_loader = partial(_load_cache_scale, num_kv_heads, held)  # type: ignore[attr-defined]
    return scale


def _load_cache_scale(
    num_kv_heads: int, held: range, scale: torch.Tensor, tensor: torch.Tensor, _: object
) -> None:
    values = tensor.float().flatten()
    if values.numel() not in (1, num_kv_heads):
        raise ValueError(f"must have 1 or {num_kv_heads} elements, got {list(tensor.shape)}")
    if not bool((values.isfinite() & (values > 0)).all()):
        raise ValueError(f"must be finite and positive, got {values.tolist()}")
    scale.copy_(values.expand(num_kv_heads)[held.start : held.stop])


@dataclass(slots=True)
class AttentionMetadata:
    """Where each token of a step sits, for all layers alike. Set by InputBatch."""

    slot_mapping: torch.Tensor
    """[num_tokens], int64."""
    block_tables: torch.Tensor
    """[num_seqs, max_blocks_per_seq], int32."""
    query_start_loc: torch.Tensor
    """[num_seqs + 1], int32."""
    seq_lens: torch.Tensor
    """[num_seqs], int32."""
    min_query_len: int
    max_query_len: int
    max_seq_len: int
    workspaces: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """float32, on CUDA; by sliding window, each holds the plan of this step for the layers that
    have it.
    """
    shared_prefix: torch.Tensor | None = None
    """[2, num_seqs], int32, see `ops.paged_attention`."""
    is_planned: bool = True
    """Whether the workspaces hold plans."""


@dataclass(slots=True)
class LastTokens:
    """Of each sequence of a step, where of its others nothing but keys and values is wanted."""

    index: torch.Tensor
    """[num_seqs], int64, among the step's tokens."""
    attention: AttentionMetadata
    """Of them alone."""


class Attention:
    """Normalises (where a model does) and rotates a step's queries and keys and writes keys and
    values into the cache, and attends over it.

    Args:
        head_dim: elements per head.
        rope_is_neox: pair element i with i + rotary_dim / 2; else (gptj) 2i with 2i + 1.
        scale: multiplies query . key; by default 1 / sqrt(head_dim).
        sliding_window: tokens a query sees, itself included; 0 for all.
        softcap: bound of the scores, by tanh; 0 for none.
        query_norm: of each query head before it is rotated; None for none.
        key_norm: of each key head, with the same eps.

    Without `cos_sin` nothing is rotated or normalised.

    A norm rounds to the model's dtype once, behind its weights. transformers rounds before them
    too, which in 16 bits loses a little more; in float32 neither rounds.
    """

    def __init__(
        self,
        head_dim: int,
        rope_is_neox: bool,
        scale: float | None = None,
        sliding_window: int = 0,
        softcap: float = 0.0,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        self.rope_is_neox = rope_is_neox
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.query_norm = query_norm
        self.key_norm = key_norm

    def project_and_cache(
        self,
        query: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
        scales: CacheScales,
    ) -> None:
        """[num_tokens, in_features] -> query, [num_tokens, num_heads, head_dim], and keys and
        values in the cache: the projection with all of `rotate_and_cache` as one kernel, where
        `ops.qkv_linear` can.
        """
        ops.qkv_linear(
            query,
            x,
            weight,
            bias,
            positions,
            *cache,
            slot_mapping,
            cos_sin,
            **self._norms(),
            k_scale=scales[0],
            v_scale=scales[1],
        )

    def rotate_and_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
        scales: CacheScales,
    ) -> None:
        """[num_tokens, num_heads, head_dim], twice [num_tokens, num_kv_heads, head_dim]; the query
        is rotated in place.
        """
        if cos_sin is None:
            ops.reshape_and_cache(
                key, value, *cache, slot_mapping, k_scale=scales[0], v_scale=scales[1]
            )
        else:
            ops.rotary_reshape_and_cache(
                positions,
                query,
                key,
                value,
                *cache,
                slot_mapping,
                cos_sin,
                is_neox=self.rope_is_neox,
                **self._norms(),
                k_scale=scales[0],
                v_scale=scales[1],
            )

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        scales: CacheScales,
    ) -> torch.Tensor:
        """[num_tokens, num_heads, head_dim] -> the same shape."""
        workspace = metadata.workspaces.get(self.sliding_window)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        ops.paged_attention(
            out,
            query,
            *cache,
            metadata.block_tables,
            metadata.query_start_loc,
            metadata.seq_lens,
            min_query_len=metadata.min_query_len,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            workspace=workspace,
            is_planned=workspace is not None and metadata.is_planned,
            shared_prefix=metadata.shared_prefix,
            k_scale=scales[0],
            v_scale=scales[1],
        )
        return out

    def _norms(self) -> dict[str, Any]:
        if self.query_norm is None or self.key_norm is None:
            return {}
        return {
            "query_norm_weight": self.query_norm.weight,
            "key_norm_weight": self.key_norm.weight,
            "norm_eps": self.query_norm.eps,
        }
