"""Finds a model's class by the architecture that its checkpoint names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nano_vllm.models.decoder import CausalLM

SUPPORTED = {
    "LlamaForCausalLM": "nano_vllm.models.llama",
    "MistralForCausalLM": "nano_vllm.models.llama",
    "Qwen2ForCausalLM": "nano_vllm.models.qwen",
    "Qwen3ForCausalLM": "nano_vllm.models.qwen",
}
"""Architecture, as config.json's `architectures` has it -> the module of the class of that name."""


def model_class(architecture: str) -> type[CausalLM]:
    """The class for an architecture; ValueError names the supported ones."""
    if architecture not in SUPPORTED:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    return getattr(importlib.import_module(SUPPORTED[architecture]), architecture)
