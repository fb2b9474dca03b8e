"""What a family of models tells in which it differs from the shared decoder; without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from nano_vllm.config import ModelConfig
from nano_vllm.config_fields import ConfigFields


class ModelFamily:
    """How to read a checkpoint's config.json and the names of its tensors; as Llama's unless a
    family says otherwise. `models.registry.model_class` puts it on the decoder.
    """

    stacked: ClassVar[dict[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }
    """Checkpoint module -> (stacked module, shard)."""
    transposed: ClassVar[tuple[str, ...]] = ()
    """Endings of the checkpoint's tensors that lie [in_features, out_features]."""
    config_names: ClassVar[dict[str, str]] = {}
    """Fields of config.json that the family calls otherwise: Llama's name -> its own."""
    config_defaults: ClassVar[dict[str, Any]] = {}
    """Fields of config.json, by the family's names, that mean this where they are absent."""
    mlp_ratio: ClassVar[int | None] = None
    """intermediate_size / hidden_size, where config.json may leave the former out."""
    always: ClassVar[dict[str, Any]] = {}
    """Fields of ModelConfig that are the same for all models of the family."""
    sliding_layers: ClassVar[str] = "none"
    """Layers that have the configuration's sliding window: none, all, or as layer_types says."""
    rope_by_layer_type: ClassVar[bool] = False
    """Whether config.json has rotary parameters for each of the layer_types."""

    @classmethod
    def layer_types(cls, fields: ConfigFields, num_layers: int) -> list[str]:
        """full_attention or sliding_attention for each layer, where config.json has no
        `layer_types`.
        """
        return ["sliding_attention"] * num_layers

    @classmethod
    def read_config(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        """The configuration with what config.json has for this family alone."""
        return config

    @classmethod
    def parameter_name(cls, name: str) -> str | None:
        """The parameter, or the part of a stacked one, that a tensor of a Hugging Face checkpoint
        fills; None where it is no weight.
        """
        return name


FindFamily = Callable[[str], type[ModelFamily]]
"""Architecture -> its family; ValueError for one that cannot run."""
