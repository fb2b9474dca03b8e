"""Shares of ranks and stages make up the model, and stages are split as well as can be."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from nano_vllm.config import ModelConfig
from nano_vllm.distributed.collectives import Collectives
from nano_vllm.distributed.partition import parameter_shard, stage_elements, vocabulary_part
from nano_vllm.distributed.stages import split_layers, whole
from nano_vllm.model_size import head_elements, matrix_elements
from nano_vllm.models.decoder import CausalLM
from nano_vllm.models.registry import model_family
from nano_vllm.weights.model_config import load_model_config
from nano_vllm.weights.resolve import bundled_names, resolve_model

LLAMA = ModelConfig("LlamaForCausalLM", 208, 64, 96, 6, 12, 4, 16, 128, 1e-6, 1e4)


def cost(config: ModelConfig, counts: tuple[int, ...]) -> int:
    """What the slowest stage reads in a step, with so many layers in each."""
    layers = [count * matrix_elements(config) for count in counts]
    return max(*layers[:-1], layers[-1] + head_elements(config)) if layers[1:] else layers[0]


def test_splits_are_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        num_layers = draw.randint(1, 9)
        config = replace(LLAMA, num_layers=num_layers, vocab_size=draw.choice((8, 200, 1000, 9000)))
        num_stages = draw.randint(1, num_layers)
        stages = split_layers(config, num_stages)
        assert [i for stage in stages for i in stage.layers] == list(range(num_layers))
        assert len(stages) == num_stages
        assert all(stage.layers for stage in stages)
        assert [stage.is_first for stage in stages] == [True, *[False] * (num_stages - 1)]
        assert [stage.is_last for stage in stages] == [*[False] * (num_stages - 1), True]
        every = (
            tuple(b - a for a, b in itertools.pairwise((0, *ends, num_layers)))
            for ends in itertools.combinations(range(1, num_layers), num_stages - 1)
        )
        best = min(cost(config, counts) for counts in every)
        assert cost(config, tuple(len(stage.layers) for stage in stages)) == best


def test_stages_make_up_the_model() -> None:
    for config in (LLAMA, replace(LLAMA, tie_word_embeddings=True)):
        whole_model = stage_elements(config, whole(config))
        for pp in range(1, 7):
            held = [
                stage_elements(parameter_shard(config, 1, stage.layers), stage)
                for stage in split_layers(config, pp)
            ]
            # a tied head is held twice by two stages
            twice = head_elements(config) if config.tie_word_embeddings and pp > 1 else 0
            assert sum(held) == whole_model + twice


def test_stages_keep_the_kinds_of_their_layers() -> None:
    mixed = replace(
        LLAMA,
        sliding_window=8,
        full_attention_layers=frozenset({1, 3, 5}),
        nope_layers=frozenset({4}),
    )
    shapes = [parameter_shard(mixed, 1, stage.layers) for stage in split_layers(mixed, 3)]
    expected = [(mixed.window(i), mixed.rope(i)) for i in range(6)]
    assert [(s.window(i), s.rope(i)) for s in shapes for i in range(s.num_layers)] == expected


def test_the_vocabulary_is_covered() -> None:
    for size, tp in itertools.product((1, 199, 200, 50257, 151936), (1, 2, 3, 8)):
        part = vocabulary_part(size, tp)
        assert size <= part * tp < size + 8 * tp
        assert tp == 1 or part % 8 == 0


@pytest.mark.parametrize("name", bundled_names())
def test_shares_shrink_and_make_up_the_model(name: str) -> None:
    config = load_model_config(resolve_model(name, "dummy"), model_family)
    all_of_it = stage_elements(config, whole(config))
    before = all_of_it + 1
    for tp in (1, 2, 4, 8):
        held = stage_elements(parameter_shard(config, tp), whole(config))
        assert all_of_it <= held * tp
        assert held < before
        before = held


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (5, "tensor_parallel_size must divide num_heads = 12, got 5"),
        (24, "tensor_parallel_size must divide num_heads = 12, got 24"),
        (3, "must divide num_kv_heads = 4 or be a multiple of it, got 3"),
    ],
)
def test_what_does_not_divide_is_refused(tp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_shard(LLAMA, tp)


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide intermediate_size = 90, got 4"):
        parameter_shard(replace(LLAMA, intermediate_size=90), 4)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at most num_layers = 6, got 7"):
        split_layers(LLAMA, 7)


class RankOf(Collectives):
    """One of several, who sends nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (12, 1), (1, 3), (2, 2), (4, 6)])
@pytest.mark.parametrize("kind", ["llama", "tied", "biases", "norms over heads", "no gate"])
def test_the_ranks_hold_what_is_counted(tp: int, pp: int, kind: str) -> None:
    config = {
        "llama": LLAMA,
        "tied": replace(LLAMA, tie_word_embeddings=True, vocab_size=199),
        "biases": replace(
            LLAMA, attention_bias=True, attention_output_bias=True, mlp_bias=True, qk_norm=True
        ),
        "norms over heads": replace(LLAMA, qk_norm=True, qk_norm_over_heads=True),
        "no gate": replace(LLAMA, gated_mlp=False, learned_positions=True, layer_norm=True),
    }[kind]
    for stage in split_layers(config, pp):
        shard = parameter_shard(config, tp, stage.layers)
        for rank in range(tp):
            with torch.device("meta") as meta:
                model = CausalLM(config, 8, meta, RankOf(rank, tp), stage)
            held = sum(parameter.numel() for parameter in model.parameters())
            assert stage_elements(shard, stage) == held
