"""Gemma 2 and Gemma 3, text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from nano_vllm.config import LayerNorms, ModelConfig
from nano_vllm.config_fields import ConfigFields
from nano_vllm.model_family import ModelFamily

_SANDWICH = LayerNorms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class Gemma2ForCausalLM(ModelFamily):
    """Norms before and behind each block, their weights stored as the difference from 1; a sliding
    window in every other layer, soft caps. Source: arXiv 2408.00118.
    """

    always: ClassVar[dict[str, Any]] = {"norms": _SANDWICH, "norm_offset": 1.0}
    config_names: ClassVar[dict[str, str]] = {"hidden_act": "hidden_activation"}
    config_defaults: ClassVar[dict[str, Any]] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    sliding_layers: ClassVar[str] = "layer_types"
    window_period: ClassVar[int] = 2
    """Every how manyth layer sees all tokens."""

    @classmethod
    def layer_types(cls, fields: ConfigFields, num_layers: int) -> list[str]:
        period = fields.integer("sliding_window_pattern", cls.window_period)
        return [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)
        ]

    @classmethod
    def read_config(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        return replace(
            config,
            embedding_multiplier=config.hidden_size**0.5,
            attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
            attention_softcap=fields.number("attn_logit_softcapping", 0.0),
            logits_softcap=fields.number("final_logit_softcapping", 0.0),
        )


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Norms of query and key heads in place of the soft caps; five layers of six have a sliding
    window and rotate by a base frequency of their own. Source: arXiv 2503.19786.
    """

    always: ClassVar[dict[str, Any]] = {**Gemma2ForCausalLM.always, "qk_norm": True}
    config_defaults: ClassVar[dict[str, Any]] = {
        **Gemma2ForCausalLM.config_defaults,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    }
    rope_by_layer_type: ClassVar[bool] = True
    window_period: ClassVar[int] = 6

    @classmethod
    def read_config(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        config = super().read_config(config, fields)
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            # The context in the config is that of the stretched model.
            original = round(config.max_position / scaling.factor)
            scaling = replace(scaling, original_max_position=original)
        # transformers reads this soft cap of Gemma 3 and does not apply it.
        return replace(config, attention_softcap=0.0, rope_scaling=scaling)
