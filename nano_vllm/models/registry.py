"""Finds a model's family and class by the architecture that its checkpoint names."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from nano_vllm.model_family import ModelFamily

if TYPE_CHECKING:
    from nano_vllm.models.decoder import CausalLM

SUPPORTED = {
    "LlamaForCausalLM": "nano_vllm.models.llama",
    "MistralForCausalLM": "nano_vllm.models.llama",
    "MinistralForCausalLM": "nano_vllm.models.llama",
    "Qwen2ForCausalLM": "nano_vllm.models.qwen",
    "Qwen3ForCausalLM": "nano_vllm.models.qwen",
    "Gemma2ForCausalLM": "nano_vllm.models.gemma",
    "Gemma3ForCausalLM": "nano_vllm.models.gemma",
    "Phi3ForCausalLM": "nano_vllm.models.phi3",
    "SmolLM3ForCausalLM": "nano_vllm.models.smollm3",
    "Olmo2ForCausalLM": "nano_vllm.models.olmo2",
    "Olmo3ForCausalLM": "nano_vllm.models.olmo2",
    "Glm4ForCausalLM": "nano_vllm.models.glm4",
    "GraniteForCausalLM": "nano_vllm.models.granite",
    "GPT2LMHeadModel": "nano_vllm.models.gpt2",
}
"""Architecture, as config.json's `architectures` has it -> the module with the family's class."""


def model_family(architecture: str) -> type[ModelFamily]:
    """What an architecture's checkpoints are read by; ValueError names the supported ones."""
    if architecture not in SUPPORTED:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    return getattr(importlib.import_module(SUPPORTED[architecture]), architecture)


@functools.cache
def model_class(architecture: str) -> type[CausalLM]:
    """The family on the shared decoder: the class that an architecture's models are built of."""
    from nano_vllm.models.decoder import CausalLM

    return type(architecture, (model_family(architecture), CausalLM), {})
