"""Llama 2, 3, 3.1, 3.2 and models of their shape (SmolLM2, Mistral): the shared decoder."""

from __future__ import annotations

from nano_vllm.models.decoder import CausalLM


class LlamaForCausalLM(CausalLM):
    """Source: arXiv 2302.13971, 2407.21783."""


class MistralForCausalLM(CausalLM):
    """A Llama with a sliding window, which the configuration tells. Source: arXiv 2310.06825."""
