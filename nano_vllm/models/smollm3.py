"""SmolLM3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from nano_vllm.config import ModelConfig
from nano_vllm.config_fields import ConfigFields
from nano_vllm.model_family import ModelFamily


class SmolLM3ForCausalLM(ModelFamily):
    """Every fourth layer rotates nothing. Source: the SmolLM3 release; arXiv 2501.18795."""

    config_defaults: ClassVar[dict[str, Any]] = {
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    }
    sliding_layers: ClassVar[str] = "layer_types"

    @classmethod
    def layer_types(cls, fields: ConfigFields, num_layers: int) -> list[str]:
        nope = _nope_layers(fields, num_layers)
        return ["sliding_attention" if i in nope else "full_attention" for i in range(num_layers)]

    @classmethod
    def read_config(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        return replace(config, nope_layers=_nope_layers(fields, config.num_layers))


def _nope_layers(fields: ConfigFields, num_layers: int) -> frozenset[int]:
    """`no_rope_layers` holds 1 for a layer that rotates and 0 for one that does not."""
    interval = fields.integer("no_rope_layer_interval")
    rotates = fields.raw("no_rope_layers", [(i + 1) % interval != 0 for i in range(num_layers)])
    is_list = isinstance(rotates, list) and len(rotates) >= num_layers
    if not is_list or any(value not in (0, 1) for value in rotates):
        raise fields.error(
            "no_rope_layers", f"must be a list of at least {num_layers} of 0 or 1, got {rotates!r}"
        )
    return frozenset(i for i in range(num_layers) if not rotates[i])
