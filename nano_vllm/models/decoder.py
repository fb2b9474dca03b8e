"""The decoder that model families share; a family's file tells only its difference."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from nano_vllm import ops
from nano_vllm.config import ModelConfig
from nano_vllm.layers.activation import gated_activation
from nano_vllm.layers.attention import Attention, AttentionMetadata, LayerCache, cache_scale
from nano_vllm.layers.embedding import Embedding
from nano_vllm.layers.linear import Linear, StackedLinear
from nano_vllm.layers.norm import RMSNorm
from nano_vllm.layers.rotary import cos_sin_cache
from nano_vllm.metrics import nvtx_range


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and, in some models, norms of query and key
    heads.
    """

    k_scale: torch.Tensor
    v_scale: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
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
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.attention = Attention(
            head_dim,
            config.rope_is_neox,
            sliding_window=config.sliding_window,
            query_norm=self.q_norm,
            key_norm=self.k_norm,
        )
        self.register_buffer("k_scale", cache_scale(self.num_kv_heads))
        self.register_buffer("v_scale", cache_scale(self.num_kv_heads))

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
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


class DecoderLayer(nn.Module):
    """Attention and feed-forward block, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """x: what the layer before adds to the residual stream; returns what this one adds."""
        with nvtx_range("attention"):
            x = self.input_layernorm.add_and_norm(x, residual)
            x = self.self_attn(x, positions, cos_sin, cache, metadata)
        with nvtx_range("mlp"):
            x = self.post_attention_layernorm.add_and_norm(x, residual)
            return self.mlp(x)


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: ModelConfig, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cos_sin = cos_sin_cache(config, max_position, device)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        caches: list[LayerCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        residual = torch.zeros_like(x)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, residual, positions, self.cos_sin, cache, metadata)
        return self.norm.add_and_norm(x, residual)


class CausalLM(nn.Module):
    """A decoder with a language-model head: token ids in, hidden states and logits out.

    Args:
        config: the decoder's shape.
        max_position: positions that rotary angles are computed for.
        device: where the angles live; parameters follow torch's default device and dtype.
    """

    stacked: ClassVar[dict[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }
    """Checkpoint module -> (stacked module, shard)."""

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
        return self.lm_head(hidden)
