"""GLM-4 (0414)."""

from __future__ import annotations

from typing import Any, ClassVar

from nano_vllm.config import LayerNorms
from nano_vllm.model_family import ModelFamily


class Glm4ForCausalLM(ModelFamily):
    """Norms before and behind each block; half of each head is rotated, in pairs of neighbours;
    gate and up are one tensor of the checkpoint. Source: arXiv 2406.12793; the GLM-4-0414 release.
    """

    always: ClassVar[dict[str, Any]] = {
        "norms": LayerNorms(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
        "rope_is_neox": False,
        "attention_output_bias": False,
        "mlp_bias": False,
    }
    config_defaults: ClassVar[dict[str, Any]] = {
        "attention_bias": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1.5625e-7,
    }
    stacked: ClassVar[dict[str, tuple[str, str]]] = {
        name: place
        for name, place in ModelFamily.stacked.items()
        if name not in ("gate_proj", "up_proj")
    }
