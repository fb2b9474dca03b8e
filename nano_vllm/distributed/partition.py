"""Which parameters a rank of a tensor and pipeline parallel model holds; without torch."""

from __future__ import annotations

from dataclasses import replace

from nano_vllm.config import ModelConfig
from nano_vllm.distributed.stages import Stage
from nano_vllm.model_size import (
    embedding_elements,
    head_elements,
    layer_elements,
    norm_elements,
)

VOCABULARY_MULTIPLE = 8
"""Of the tokens of a part: rows of logits begin at multiples of 16 bytes."""


def parameter_shard(config: ModelConfig, tp: int, layers: range | None = None) -> ModelConfig:
    """The shape of the parameters that one of tp ranks holds, of some consecutive layers or all:
    its part of the layers, and of the vocabulary, with padding behind the last tokens. ValueError,
    with the numbers, where something does not divide. Source: Megatron-LM, arXiv 1909.08053.
    """
    part = vocabulary_part(config.vocab_size, tp)
    return replace(config.shard(tp, layers), vocab_size=part)


def vocabulary_part(vocab_size: int, tp: int) -> int:
    """Tokens of the vocabulary for each of tp ranks, padding included."""
    if tp == 1:
        return vocab_size
    return -(-vocab_size // (tp * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE


def stage_elements(shard: ModelConfig, stage: Stage) -> int:
    """Parameters of a stage: its layers, the embeddings in front of the first, the last norm and
    the head behind the last. A head that is the embedding is one more matrix, unless both are in
    one stage.

    Args:
        shard: what a rank holds of the stage's layers.
        stage: what is in front of them and behind.
    """
    total = shard.num_layers * layer_elements(shard)
    if stage.is_first:
        total += embedding_elements(shard)
    if stage.is_last:
        total += norm_elements(shard)
        if not (shard.tie_word_embeddings and stage.is_first):
            total += head_elements(shard)
    return total
