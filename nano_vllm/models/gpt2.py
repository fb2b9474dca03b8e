"""GPT-2."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

from nano_vllm.config import ModelConfig
from nano_vllm.config_fields import ConfigFields
from nano_vllm.model_family import ModelFamily

_MODULES = {
    "wte": "model.embed_tokens",
    "wpe": "model.embed_positions",
    "ln_f": "model.norm",
    "ln_1": "input_layernorm",
    "attn.c_attn": "self_attn.qkv_proj",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


class GPT2LMHeadModel(ModelFamily):
    """Learned positions, LayerNorm, biases, an MLP without a gate. Source: Radford et al. 2019,
    *Language Models are Unsupervised Multitask Learners*.
    """

    always: ClassVar[dict[str, Any]] = {
        "learned_positions": True,
        "layer_norm": True,
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    }
    stacked: ClassVar[dict[str, tuple[str, str]]] = {}
    transposed: ClassVar[tuple[str, ...]] = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    config_names: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    config_defaults: ClassVar[dict[str, Any]] = {
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }

    mlp_ratio: ClassVar[int | None] = 4

    @classmethod
    def read_config(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        scaled = fields.flag("scale_attn_weights", True)
        return replace(config, attention_scale=None if scaled else 1.0)

    @classmethod
    def parameter_name(cls, name: str) -> str | None:
        name = name.removeprefix("transformer.")
        layer = re.fullmatch(r"h\.(\d+)\.(.+)", name)
        module, _, leaf = (layer[2] if layer else name).rpartition(".")
        if module == "attn" and leaf in ("bias", "masked_bias"):
            return None  # the causal mask
        if module not in _MODULES:
            return name
        prefix = f"model.layers.{layer[1]}." if layer else ""
        return f"{prefix}{_MODULES[module]}.{leaf}"
