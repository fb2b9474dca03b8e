"""Qwen2, Qwen2.5 and Qwen3, dense."""

from __future__ import annotations

from typing import Any, ClassVar

from nano_vllm.config_fields import ConfigFields
from nano_vllm.model_family import ModelFamily


class Qwen2ForCausalLM(ModelFamily):
    """Biases on query, key and value. Source: arXiv 2407.10671, 2412.15115."""

    always: ClassVar[dict[str, Any]] = {"attention_bias": True}
    sliding_layers: ClassVar[str] = "layer_types"
    config_defaults: ClassVar[dict[str, Any]] = {"use_sliding_window": False}

    @classmethod
    def layer_types(cls, fields: ConfigFields, num_layers: int) -> list[str]:
        first = min(fields.integer("max_window_layers", minimum=0), num_layers)
        return ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)


class Qwen3ForCausalLM(Qwen2ForCausalLM):
    """Norms of query and key heads in their place. Source: arXiv 2505.09388."""

    always: ClassVar[dict[str, Any]] = {"qk_norm": True}
