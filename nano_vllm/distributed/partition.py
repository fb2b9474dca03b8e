"""Which part of a model each rank holds: by heads and columns within a stage, by layers between
stages; without torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from nano_vllm.config import ModelConfig
from nano_vllm.model_size import (
    embedding_elements,
    head_elements,
    layer_elements,
    norm_elements,
)

VOCABULARY_MULTIPLE = 8
"""Of the tokens of a part: rows of logits begin at multiples of 16 bytes."""


def tensor_shard(config: ModelConfig, tp: int) -> ModelConfig:
    """The shape of the parameters that one of tp ranks holds: its part of the layers, and of the
    vocabulary, with padding behind the last tokens. ValueError, with the numbers, where something
    does not divide. Source: Megatron-LM, arXiv 1909.08053.
    """
    return replace(config.shard(tp), vocab_size=vocabulary_part(config.vocab_size, tp))


def vocabulary_part(vocab_size: int, tp: int) -> int:
    """Tokens of the vocabulary for each of tp ranks, padding included."""
    if tp == 1:
        return vocab_size
    return -(-vocab_size // (tp * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE


def stage_shard(config: ModelConfig, layers: range) -> ModelConfig:
    """The shape of consecutive layers of a model, numbered from 0."""
    return replace(
        config,
        num_layers=len(layers),
        full_attention_layers=_renumbered(config.full_attention_layers, layers),
        nope_layers=_renumbered(config.nope_layers, layers),
    )


def stage_elements(config: ModelConfig, layers: range, pp: int) -> int:
    """Parameters of a stage of pp: its layers, the embedding in front of the first, the last norm
    and the head behind the last. A head that is the embedding is one more matrix, unless both are
    in one stage.

    Args:
        config: the whole model, or a tensor-parallel rank's share of all its layers.
        layers: of the stage.
        pp: number of stages.
    """
    total = len(layers) * layer_elements(config)
    if layers.start == 0:
        total += embedding_elements(config)
    if layers.stop == config.num_layers:
        total += norm_elements(config)
        if not config.tie_word_embeddings or pp > 1:
            total += head_elements(config)
    return total


def split_layers(config: ModelConfig, pp: int) -> list[range]:
    """The layers of each of pp stages, so that the largest stage, in parameters, is as small as it
    can be. ValueError where there are more stages than layers.
    """
    if not 1 <= pp <= config.num_layers:
        raise ValueError(
            f"pipeline_parallel_size must be in [1, {config.num_layers}], the number of layers, "
            f"got {pp}"
        )
    alone = (range(i, i + 1) for i in range(config.num_layers))
    return split_by_cost([stage_elements(config, layers, pp) for layers in alone], pp)


def split_by_cost(costs: Sequence[int], num_parts: int) -> list[range]:
    """Consecutive items in num_parts parts of one or more, so that the dearest part costs as little
    as it can. Of several such splits, the one with the least sum of squares: it evens out the rest.

    Args:
        costs: of each item, 0 or more.
        num_parts: at most as many as items.
    """
    sums = [0, *accumulate(costs)]

    def fits(limit: int) -> bool:
        end, parts = 0, 0
        while end < len(costs) and parts <= num_parts:
            end, parts = bisect_right(sums, sums[end] + limit) - 1, parts + 1
        return parts <= num_parts

    limit = bisect_left(range(sums[-1]), True, lo=max(costs), key=fits)
    # Items in front -> of the parts so far, the sum of squares and where each begins.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(num_parts):
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for begin, (squares, begins) in best.items():
            for end in range(begin + 1, len(sums)):
                cost = sums[end] - sums[begin]
                if cost > limit:
                    break
                split = (squares + cost * cost, (*begins, begin))
                reached[end] = min(reached.get(end, split), split)
        best = reached
    begins = best[len(costs)][1]
    return [range(a, b) for a, b in zip(begins, (*begins[1:], len(costs)), strict=True)]


def _renumbered(of_model: frozenset[int], layers: range) -> frozenset[int]:
    return frozenset(layer - layers.start for layer in of_model if layer in layers)
