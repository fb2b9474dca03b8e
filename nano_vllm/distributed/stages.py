"""Which layers each stage of a pipeline holds."""

from __future__ import annotations

from dataclasses import dataclass

from nano_vllm.config import ModelConfig
from nano_vllm.model_size import head_elements, matrix_elements


@dataclass(frozen=True)
class Stage:
    """Consecutive layers."""

    layers: range
    is_first: bool = True
    """It embeds the tokens."""
    is_last: bool = True
    """It has the last norm and the head."""


def whole(config: ModelConfig) -> Stage:
    """All there is, on one stage."""
    return Stage(range(config.num_layers))


def split_layers(config: ModelConfig, num_stages: int) -> list[Stage]:
    """Stages that cost as much as each other, as near as whole layers allow; ValueError where there
    are fewer layers than stages.

    The cost is the weights that a step of decodes reads: of the embedding next to none, of the head
    all.
    """
    if num_stages > config.num_layers:
        raise ValueError(
            f"pipeline_parallel_size must be at most num_layers = {config.num_layers}, "
            f"got {num_stages}"
        )
    layer = matrix_elements(config)
    costs = [layer] * num_stages
    costs[-1] += head_elements(config)
    counts = [1] * num_stages
    for _ in range(config.num_layers - num_stages):
        cheapest = costs.index(min(costs))
        counts[cheapest] += 1
        costs[cheapest] += layer
    stages = []
    first = 0
    for index, count in enumerate(counts):
        stages.append(Stage(range(first, first + count), index == 0, index == num_stages - 1))
        first += count
    return stages
