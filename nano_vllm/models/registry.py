"""Finds a model's class by the architecture that its checkpoint names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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
    "GraniteForCausalLM": "nano_vllm.models.granite",
    "GPT2LMHeadModel": "nano_vllm.models.gpt2",
}
"""Architecture, as config.json's `architectures` has it -> the module of the class of that name."""


def model_class(architecture: str) -> type[CausalLM]:
    """The class for an architecture; ValueError names the supported ones."""
    if architecture not in SUPPORTED:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    return getattr(importlib.import_module(SUPPORTED[architecture]), architecture)
