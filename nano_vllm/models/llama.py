"""Llama 2, 3, 3.1, 3.2 and models of their shape: SmolLM2, Mistral, Ministral."""

from __future__ import annotations

from typing import ClassVar

from nano_vllm.model_family import ModelFamily


class LlamaForCausalLM(ModelFamily):
    """Source: arXiv 2302.13971, 2407.21783."""


class MistralForCausalLM(ModelFamily):
    """A sliding window in all layers. Source: arXiv 2310.06825."""

    sliding_layers: ClassVar[str] = "all"


class MinistralForCausalLM(ModelFamily):
    """A sliding window in some layers."""

    sliding_layers: ClassVar[str] = "layer_types"
