"""OLMo 2 and 3."""

from __future__ import annotations

from typing import Any, ClassVar

from nano_vllm.config import LayerNorms
from nano_vllm.config_fields import ConfigFields
from nano_vllm.model_family import ModelFamily


class Olmo2ForCausalLM(ModelFamily):
    """Norms behind the blocks alone, and of queries and keys over all heads. Source: arXiv
    2501.00656.
    """

    always: ClassVar[dict[str, Any]] = {
        "norms": LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        "qk_norm": True,
        "qk_norm_over_heads": True,
    }
    config_defaults: ClassVar[dict[str, Any]] = {"rms_norm_eps": 1e-5}


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """A sliding window in three layers of four, where the rotary positions are not scaled. Source:
    the OLMo 3 release.
    """

    config_defaults: ClassVar[dict[str, Any]] = {
        **Olmo2ForCausalLM.config_defaults,
        "sliding_window": 4096,
        "rope_theta": 500_000.0,
        "rope_local_base_freq": 500_000.0,
    }
    sliding_layers: ClassVar[str] = "layer_types"
    rope_by_layer_type: ClassVar[bool] = True

    @classmethod
    def layer_types(cls, fields: ConfigFields, num_layers: int) -> list[str]:
        return ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(num_layers)]
