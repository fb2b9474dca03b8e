"""The decoder that model families share; a family's file tells only its difference."""

from __future__ import annotations

import re

import torch
from torch import nn

from nano_vllm import ops
from nano_vllm.config import ModelConfig
from nano_vllm.distributed.collectives import ALONE, Collectives
from nano_vllm.distributed.sharding import share
from nano_vllm.distributed.stages import Stage, whole
from nano_vllm.layers.activation import activation, gated_activation
from nano_vllm.layers.attention import (
    Attention,
    AttentionMetadata,
    LastTokens,
    LayerCache,
    cache_scale,
)
from nano_vllm.layers.embedding import Embedding, LMHead
from nano_vllm.layers.linear import RowParallelLinear, StackedLinear
from nano_vllm.layers.norm import LayerNorm, RMSNorm, SharedRMSNorm
from nano_vllm.layers.rotary import cos_sin_cache
from nano_vllm.metrics import nvtx_range
from nano_vllm.model_family import ModelFamily


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """A norm of the residual stream."""
    if config.layer_norm:
        return LayerNorm(config.hidden_size, config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and, in some models, norms of queries and keys,
    each head's or all heads'.
    """

    k_scale: torch.Tensor
    v_scale: torch.Tensor

    def __init__(self, config: ModelConfig, layer: int, ranks: Collectives) -> None:
        super().__init__()
        self.head_dim = head_dim = config.head_dim
        held = share(config.num_kv_heads, ranks)
        self.num_heads, self.num_kv_heads = len(share(config.num_heads, ranks)), len(held)
        query_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.qkv_proj = StackedLinear(
            config.hidden_size,
            {"q": query_size, "k": kv_size, "v": kv_size},
            bias=config.attention_bias,
            unit=head_dim,
            ranks=ranks,
        )
        self.o_proj = RowParallelLinear(
            query_size, config.hidden_size, bias=config.attention_output_bias, ranks=ranks
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.norms_all_heads = config.qk_norm_over_heads
        eps, offset = config.rms_norm_eps, config.norm_offset
        if self.norms_all_heads:
            self.q_norm = SharedRMSNorm(query_size, eps, offset, head_dim, ranks)
            self.k_norm = SharedRMSNorm(kv_size, eps, offset, head_dim, ranks)
        elif config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(head_dim, eps, offset) for _ in range(2))
        self.attention = Attention(
            head_dim,
            config.rope_is_neox,
            scale=config.attention_scale,
            sliding_window=config.window(layer),
            softcap=config.attention_softcap,
            query_norm=None if self.norms_all_heads else self.q_norm,
            key_norm=None if self.norms_all_heads else self.k_norm,
        )
        self.fuses_rotary = (
            config.rope_is_neox
            and config.rotary_dim in (None, head_dim)
            and not self.norms_all_heads
        )
        self.register_buffer("k_scale", cache_scale(config.num_kv_heads, held))
        self.register_buffer("v_scale", cache_scale(config.num_kv_heads, held))

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        last: LastTokens | None,
    ) -> torch.Tensor:
        is_float8 = cache[0].dtype == torch.float8_e4m3fn
        scales = (self.k_scale, self.v_scale) if is_float8 else (None, None)
        where = cache, metadata.slot_mapping, scales
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        if (
            self.fuses_rotary
            and cos_sin is not None
            and ops.qkv_linear_pays(weight, len(x), self.head_dim)
        ):
            query = x.new_empty(len(x), self.num_heads, self.head_dim)
            self.attention.project_and_cache(query, x, weight, bias, positions, cos_sin, *where)
        else:
            query, key, value = self._project(x)
            self.attention.rotate_and_cache(query, key, value, positions, cos_sin, *where)
        if last is not None:
            query, metadata = query.index_select(0, last.index), last.attention
        return self.o_proj(self.attention.attend(query, cache, metadata, scales).flatten(1))

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value, each [num_tokens, its heads, head_dim]."""
        qkv = self.qkv_proj(x)
        if self.norms_all_heads:
            start = 0
            for norm in (self.q_norm, self.k_norm):
                assert isinstance(norm, SharedRMSNorm)
                end = start + norm.weight.shape[0]
                norm.norm_in_place(qkv[:, start:end])
                start = end
        qkv = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        return qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, ranks: Collectives) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = StackedLinear(
            config.hidden_size, {"gate": size, "up": size}, bias=config.mlp_bias, ranks=ranks
        )
        self.down_proj = RowParallelLinear(
            size, config.hidden_size, bias=config.mlp_bias, ranks=ranks
        )
        self.activation = gated_activation(config.hidden_act)
        self.fuses_silu = (
            config.hidden_act == "silu"
            and not config.mlp_bias
            and self.gate_up_proj.weight.device.type == "cuda"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.gate_up_proj.weight
        if self.fuses_silu and ops.linear_silu_and_mul_pays(weight, x.shape[0]):
            out = x.new_empty(x.shape[0], self.down_proj.weight.shape[1])
            ops.linear_silu_and_mul(out, x, weight)
            return self.down_proj(out)
        gate_up = self.gate_up_proj(x)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self.activation(out, gate_up)
        return self.down_proj(out)


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, ranks: Collectives) -> None:
        super().__init__()
        size = config.intermediate_size
        self.up_proj = StackedLinear(
            config.hidden_size, {"up": size}, bias=config.mlp_bias, ranks=ranks
        )
        self.down_proj = RowParallelLinear(
            size, config.hidden_size, bias=config.mlp_bias, ranks=ranks
        )
        self.activation = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each between the norms that `ModelConfig.norms` names, and
    added to the residual stream.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        ranks: Collectives,
        is_behind_layer: bool,
        is_before_norm: bool,
    ) -> None:
        super().__init__()
        self.names = config.norms
        self.residual_multiplier = config.residual_multiplier
        for name in (
            self.names.before_attention,
            self.names.after_attention,
            self.names.before_mlp,
            self.names.after_mlp,
        ):
            if name is not None:
                setattr(self, name, make_norm(config))
        self.self_attn = SelfAttention(config, layer, ranks)
        self.mlp = GatedMLP(config, ranks) if config.gated_mlp else MLP(config, ranks)
        # A norm can sum over the ranks what it reads, where nothing comes between.
        self._ranks = ranks
        self._reads_parts = is_behind_layer and _norms_sum(config, ranks)
        self.self_attn.o_proj.sums = not _norms_sum(config, ranks)
        self.mlp.down_proj.sums = not (is_before_norm and _norms_sum(config, ranks))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
        last: LastTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: what the layer before adds to the residual stream; returns what this one adds, and the
        stream; of the last tokens alone if they are given.
        """
        with nvtx_range("attention"):
            x = self._read(x, residual, self.names.before_attention, self._reads_parts)
            x = self.self_attn(x, positions, cos_sin, cache, metadata, last)
            x = self._contribution(x, self.names.after_attention)
        if last is not None:
            residual = residual.index_select(0, last.index)
        with nvtx_range("mlp"):
            x = self._read(x, residual, self.names.before_mlp, not self.self_attn.o_proj.sums)
            return self._contribution(self.mlp(x), self.names.after_mlp), residual

    def _read(
        self, x: torch.Tensor, residual: torch.Tensor, norm: str | None, is_part: bool
    ) -> torch.Tensor:
        """Add x to the residual stream, in place; the stream, through the norm.

        Args:
            is_part: whether x is this rank's part of a sum.
        """
        if norm is None:
            return residual.add_(x)
        if is_part:
            return getattr(self, norm).sum_and_norm(x, residual, self._ranks)
        return getattr(self, norm).add_and_norm(x, residual)

    def _contribution(self, x: torch.Tensor, norm: str | None) -> torch.Tensor:
        """What a block adds to the residual stream."""
        if norm is not None:
            x = getattr(self, norm)(x)
        return x if self.residual_multiplier == 1.0 else x * self.residual_multiplier


def _norms_sum(config: ModelConfig, ranks: Collectives) -> bool:
    """Whether the norms that read the residual stream sum over the ranks what they add to it."""
    names = config.norms
    return (
        ranks.size > 1
        and not config.layer_norm
        and names.before_attention is not None
        and names.before_mlp is not None
        and names.after_attention is None
        and names.after_mlp is None
        and config.residual_multiplier == 1.0
    )


class Decoder(nn.Module):
    """Embeddings, layers and the last norm, or what a stage of a pipeline has of them."""

    def __init__(
        self,
        config: ModelConfig,
        max_position: int,
        device: torch.device,
        ranks: Collectives,
        stage: Stage,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.embed_tokens: Embedding | None = None
        self.embed_positions: Embedding | None = None
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = Embedding(
                config.vocab_size, config.hidden_size, config.embedding_multiplier, ranks
            )
        if stage.is_first and config.learned_positions:
            self.embed_positions = Embedding(config.max_position, config.hidden_size)
        self.layers = nn.ModuleDict(
            {
                str(i): DecoderLayer(
                    config,
                    i,
                    ranks,
                    is_behind_layer=i != stage.layers[0],
                    is_before_norm=i != stage.layers[-1] or stage.is_last,
                )
                for i in stage.layers
            }
        )
        """By their numbers in the model."""
        self.norm = make_norm(config) if stage.is_last else None
        self._ranks = ranks
        self._reads_parts = len(stage.layers) > 0 and _norms_sum(config, ranks)
        ropes = [config.rope(i) for i in stage.layers]
        tables = {
            rope: cos_sin_cache(config, rope, max_position, device)
            for rope in dict.fromkeys(ropes)
            if rope is not None
        }
        self.cos_sin = [None if rope is None else tables[rope] for rope in ropes]
        """For each layer; None for one that rotates nothing."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[LayerCache],
        metadata: AttentionMetadata,
        received: torch.Tensor | None,
        last: LastTokens | None,
    ) -> torch.Tensor:
        x = self._embed(input_ids, positions) if received is None else received
        residual = torch.zeros_like(x)
        layers = zip(self.layers.values(), self.cos_sin, caches, strict=True)
        for number, (layer, cos_sin, cache) in enumerate(layers, 1):
            wanted = last if number == len(self.layers) else None
            x, residual = layer(x, residual, positions, cos_sin, cache, metadata, wanted)
        if self.norm is None:
            return residual.add_(x)
        if self._reads_parts:
            assert isinstance(self.norm, RMSNorm)
            return self.norm.sum_and_norm(x, residual, self._ranks)
        return self.norm.add_and_norm(x, residual)

    def _embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert self.embed_tokens is not None
        x = self.embed_tokens(input_ids)
        return x if self.embed_positions is None else x + self.embed_positions(positions)


class CausalLM(ModelFamily, nn.Module):
    """A decoder with a language-model head: token ids in, hidden states and logits out.

    Args:
        config: the decoder's shape.
        max_position: positions that rotary angles are computed for.
        device: where the angles live; parameters follow torch's default device and dtype.
        ranks: who shares the layers' weights.
        stage: which layers these are; None for all.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_position: int,
        device: torch.device,
        ranks: Collectives = ALONE,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        stage = whole(config) if stage is None else stage
        self.model = Decoder(config, max_position, device, ranks, stage)
        self.lm_head: LMHead | None = None
        if stage.is_last:
            self.lm_head = LMHead(config.hidden_size, config.vocab_size, ranks)
            if config.tie_word_embeddings:
                assert self.model.embed_tokens is not None
                self.lm_head.weight = self.model.embed_tokens.weight

    def is_elsewhere(self, name: str) -> bool:
        """Whether a parameter, or a part of one, is another stage's."""
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match is not None:
            layer = int(match[1])
            return layer < self.config.num_layers and layer not in self.model.stage.layers
        stage = self.model.stage
        return (
            (name.startswith("model.embed_tokens.") and self.model.embed_tokens is None)
            or (name.startswith("model.embed_positions.") and not stage.is_first)
            or (name.startswith(("model.norm.", "lm_head.")) and not stage.is_last)
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[LayerCache],
        metadata: AttentionMetadata,
        received: torch.Tensor | None = None,
        last: LastTokens | None = None,
    ) -> torch.Tensor:
        """[num_tokens] ids and positions (int64) -> hidden states [num_tokens, hidden_size].

        Args:
            received: the hidden states of the stage before; None for the first.
            last: whose hidden states are wanted, [num_seqs, hidden_size]; None for all tokens.
        """
        return self.model(input_ids, positions, caches, metadata, received, last)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, the rank's part of the vocabulary, padded]."""
        assert self.lm_head is not None, "the last stage has the head"
        logits = self.lm_head(hidden)
        if self.config.logits_divisor != 1.0:
            logits.div_(self.config.logits_divisor)
        if self.config.logits_softcap:
            cap = self.config.logits_softcap
            logits.div_(cap).tanh_().mul_(cap)
        return logits
