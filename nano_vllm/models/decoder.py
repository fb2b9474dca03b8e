"""The decoder that model families share; a family's file tells only its difference."""

from __future__ import annotations

import torch
from torch import nn

from nano_vllm import ops
from nano_vllm.config import ModelConfig
from nano_vllm.layers.activation import activation, gated_activation
from nano_vllm.layers.attention import Attention, AttentionMetadata, LayerCache, cache_scale
from nano_vllm.layers.embedding import Embedding
from nano_vllm.layers.linear import Linear, StackedLinear
from nano_vllm.layers.norm import LayerNorm, RMSNorm
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

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        head_dim = config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            head_dim,
        )
        kv_size = self.num_kv_heads * head_dim
        self.qkv_proj = StackedLinear(
            config.hidden_size,
            {"q": self.num_heads * head_dim, "k": kv_size, "v": kv_size},
            bias=config.attention_bias,
        )
        self.o_proj = Linear(
            self.num_heads * head_dim, config.hidden_size, bias=config.attention_output_bias
        )
        self.norms_all_heads = config.qk_norm_over_heads
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            query_size = self.num_heads * head_dim
            sizes = (query_size, kv_size) if self.norms_all_heads else (head_dim, head_dim)
            self.q_norm, self.k_norm = (
                RMSNorm(size, config.rms_norm_eps, config.norm_offset) for size in sizes
            )
        self.attention = Attention(
            head_dim,
            config.rope_is_neox,
            scale=config.attention_scale,
            sliding_window=config.window(layer),
            softcap=config.attention_softcap,
            query_norm=None if self.norms_all_heads else self.q_norm,
            key_norm=None if self.norms_all_heads else self.k_norm,
        )
        self.register_buffer("k_scale", cache_scale(self.num_kv_heads))
        self.register_buffer("v_scale", cache_scale(self.num_kv_heads))

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        qkv = self.qkv_proj(x)
        if self.norms_all_heads:
            start = 0
            for norm in (self.q_norm, self.k_norm):
                assert norm is not None
                part = qkv[:, start : start + norm.weight.shape[0]]
                ops.rms_norm(part, part, norm.weight, norm.eps)
                start += part.shape[1]
        qkv = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        out = self.attention(
            query, key, value, positions, cos_sin, cache, metadata, self.k_scale, self.v_scale
        )
        return self.o_proj(out.flatten(1))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = StackedLinear(
            config.hidden_size, {"gate": size, "up": size}, bias=config.mlp_bias
        )
        self.down_proj = Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.activation = gated_activation(config.hidden_act)
        self.fuses_silu = (
            config.hidden_act == "silu"
            and not config.mlp_bias
            and self.gate_up_proj.weight.device.type == "cuda"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fuses_silu and x.shape[0] <= self.gate_up_proj.max_rows:
            out = x.new_empty(x.shape[0], self.down_proj.weight.shape[1])
            ops.linear_silu_and_mul(out, x, self.gate_up_proj.weight)
            return self.down_proj(out)
        gate_up = self.gate_up_proj(x)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self.activation(out, gate_up)
        return self.down_proj(out)


class MLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each between the norms that `ModelConfig.norms` names, and
    added to the residual stream.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
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
        self.self_attn = SelfAttention(config, layer)
        self.mlp = GatedMLP(config) if config.gated_mlp else MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor | None,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """x: what the layer before adds to the residual stream; returns what this one adds."""
        with nvtx_range("attention"):
            x = self._read(x, residual, self.names.before_attention)
            x = self.self_attn(x, positions, cos_sin, cache, metadata)
            x = self._contribution(x, self.names.after_attention)
        with nvtx_range("mlp"):
            x = self._read(x, residual, self.names.before_mlp)
            return self._contribution(self.mlp(x), self.names.after_mlp)

    def _read(self, x: torch.Tensor, residual: torch.Tensor, norm: str | None) -> torch.Tensor:
        """Add x to the residual stream, in place; the stream, through the norm."""
        if norm is None:
            return residual.add_(x)
        return getattr(self, norm).add_and_norm(x, residual)

    def _contribution(self, x: torch.Tensor, norm: str | None) -> torch.Tensor:
        """What a block adds to the residual stream."""
        if norm is not None:
            x = getattr(self, norm)(x)
        return x if self.residual_multiplier == 1.0 else x * self.residual_multiplier


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: ModelConfig, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, config.embedding_multiplier
        )
        self.embed_positions = (
            Embedding(config.max_position, config.hidden_size) if config.learned_positions else None
        )
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = make_norm(config)
        ropes = [config.rope(i) for i in range(config.num_layers)]
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
    ) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        residual = torch.zeros_like(x)
        for layer, cos_sin, cache in zip(self.layers, self.cos_sin, caches, strict=True):
            x = layer(x, residual, positions, cos_sin, cache, metadata)
        return self.norm.add_and_norm(x, residual)


class CausalLM(ModelFamily, nn.Module):
    """A decoder with a language-model head: token ids in, hidden states and logits out.

    Args:
        config: the decoder's shape.
        max_position: positions that rotary angles are computed for.
        device: where the angles live; parameters follow torch's default device and dtype.
    """

    def __init__(self, config: ModelConfig, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, max_position, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[LayerCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """[num_tokens] ids and positions (int64) -> hidden states [num_tokens, hidden_size]."""
        return self.model(input_ids, positions, caches, metadata)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size]."""
        logits = self.lm_head(hidden)
        if self.config.logits_divisor != 1.0:
            logits.div_(self.config.logits_divisor)
        if self.config.logits_softcap:
            cap = self.config.logits_softcap
            logits.div_(cap).tanh_().mul_(cap)
        return logits
