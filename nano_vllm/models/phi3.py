"""Phi-3, Phi-3.5 and Phi-4 (mini and 14B), text."""

from __future__ import annotations

from typing import ClassVar

from nano_vllm.model_family import ModelFamily


class Phi3ForCausalLM(ModelFamily):
    """Query, key and value in one tensor of the checkpoint, gate and up in another. Source: arXiv
    2404.14219, 2412.08905.
    """

    stacked: ClassVar[dict[str, tuple[str, str]]] = {}
    sliding_layers: ClassVar[str] = "all"
