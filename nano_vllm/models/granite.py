"""Granite 3, dense."""

from __future__ import annotations

from dataclasses import replace

from nano_vllm.config import ModelConfig
from nano_vllm.config_fields import ConfigFields
from nano_vllm.model_family import ModelFamily


class GraniteForCausalLM(ModelFamily):
    """A Llama with multipliers. Source: the Granite 3.0 report; arXiv 2408.13359."""

    @classmethod
    def read_config(cls, config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        return replace(
            config,
            embedding_multiplier=fields.number("embedding_multiplier", 1.0),
            residual_multiplier=fields.number("residual_multiplier", 1.0),
            attention_scale=fields.number("attention_multiplier", 1.0),
            logits_divisor=fields.number("logits_scaling", 1.0),
        )
