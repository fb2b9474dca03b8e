"""OLMo 2."""

from __future__ import annotations

from typing import Any, ClassVar

from nano_vllm.config import LayerNorms
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
