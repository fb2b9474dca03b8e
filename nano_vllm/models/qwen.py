"""Qwen2, Qwen2.5 and Qwen3, dense: the shared decoder with flags of the configuration."""

from __future__ import annotations

from nano_vllm.models.decoder import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """Biases on query, key and value (`attention_bias`). Source: arXiv 2407.10671, 2412.15115."""


class Qwen3ForCausalLM(CausalLM):
    """Norms of query and key heads in their place (`qk_norm`). Source: arXiv 2505.09388."""
