"""Shares of ranks and stages make up the model, and stages are split as well as can be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch

from nano_vllm.config import ModelConfig
from nano_vllm.distributed.partition import (
    split_by_cost,
    split_layers,
    stage_elements,
    stage_shard,
    tensor_shard,
    vocabulary_part,
)
from nano_vllm.models.decoder import CausalLM
from nano_vllm.models.registry import model_family
from nano_vllm.weights.model_config import load_model_config
from nano_vllm.weights.resolve import bundled_names, resolve_model

LLAMA = ModelConfig("LlamaForCausalLM", 208, 64, 96, 6, 12, 4, 16, 128, 1e-6, 1e4)


def split(costs: list[int], begins: tuple[int, ...]) -> tuple[int, int]:
    """What the dearest part costs, and the sum of squares."""
    ends = (*begins[1:], len(costs))
    parts = [sum(costs[a:b]) for a, b in zip(begins, ends, strict=True)]
    return max(parts), sum(part * part for part in parts)


def test_splits_are_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(500):
        costs = [draw.choice((0, 1, 2, 3, 7, 40)) for _ in range(draw.randrange(1, 9))]
        num_parts = draw.randint(1, len(costs))
        parts = split_by_cost(costs, num_parts)
        assert [i for part in parts for i in part] == list(range(len(costs)))
        assert len(parts) == num_parts
        assert all(parts)
        every = itertools.combinations(range(1, len(costs)), num_parts - 1)
        best = min(split(costs, (0, *begins)) for begins in every)
        assert split(costs, tuple(part.start for part in parts)) == best


def test_a_large_head_makes_the_last_stage_short() -> None:
    wide = replace(LLAMA, vocab_size=4096)
    assert [len(s) for s in split_layers(LLAMA, 3)] == [2, 2, 2]
    sizes = [len(stage) for stage in split_layers(wide, 3)]
    assert sizes == [1, 4, 1]
    stages = split_layers(wide, 2)
    costs = [stage_elements(wide, stage, 2) for stage in stages]
    assert sum(costs) == stage_elements(wide, range(6), 1)


def test_a_tied_head_is_held_twice_by_two_stages() -> None:
    tied = replace(LLAMA, tie_word_embeddings=True)
    table = tied.vocab_size * tied.hidden_size
    halves = [stage_elements(tied, stage, 2) for stage in split_layers(tied, 2)]
    assert sum(halves) == stage_elements(tied, range(6), 1) + table


def test_stages_keep_the_kinds_of_their_layers() -> None:
    mixed = replace(
        LLAMA,
        sliding_window=8,
        full_attention_layers=frozenset({1, 3, 5}),
        nope_layers=frozenset({4}),
    )
    stages = split_layers(mixed, 3)
    shapes = [stage_shard(mixed, stage) for stage in stages]
    whole = [(mixed.window(i), mixed.rope(i)) for i in range(6)]
    parts = [(s.window(i), s.rope(i)) for s in shapes for i in range(s.num_layers)]
    assert parts == whole


def sharded_elements(config: ModelConfig, tp: int) -> Iterator[int]:
    """Parameters of the whole model, each cut as Megatron-LM does: by its name."""
    with torch.device("meta") as meta:
        model = CausalLM(config, 8, meta)
    head_dim, kv = config.head_dim, max(config.num_kv_heads, tp)
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-2]
        shape = list(parameter.shape)
        if leaf == "qkv_proj":
            shape[0] = (config.num_heads + 2 * kv) * head_dim // tp
        elif leaf in ("gate_up_proj", "up_proj"):
            shape[0] //= tp
        elif leaf in ("embed_tokens", "lm_head"):
            shape[0] = vocabulary_part(shape[0], tp)
        elif leaf in ("o_proj", "down_proj") and len(shape) == 2:
            shape[1] //= tp
        yield prod(shape)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 12])
def test_a_rank_holds_its_part_of_every_parameter(tp: int) -> None:
    for config in (
        LLAMA,
        replace(
            LLAMA, qk_norm=True, attention_bias=True, attention_output_bias=True, mlp_bias=True
        ),
        replace(LLAMA, gated_mlp=False, tie_word_embeddings=True, vocab_size=199),
    ):
        if config.num_kv_heads % tp and tp % config.num_kv_heads:
            with pytest.raises(ValueError, match=r"num_kv_heads = 4 .*, got "):
                tensor_shard(config, tp)
            continue
        share = tensor_shard(config, tp)
        layers = range(config.num_layers)
        assert stage_elements(share, layers, 1) == sum(sharded_elements(config, tp))


def test_the_vocabulary_is_covered() -> None:
    for size, tp in itertools.product((1, 199, 200, 50257, 151936), (1, 2, 3, 8)):
        part = vocabulary_part(size, tp)
        assert size <= part * tp < size + 8 * tp
        assert tp == 1 or part % 8 == 0


@pytest.mark.parametrize("name", bundled_names())
def test_shares_shrink_and_make_up_the_model(name: str) -> None:
    config = load_model_config(resolve_model(name, "dummy"), model_family)
    layers = range(config.num_layers)
    whole = stage_elements(config, layers, 1)
    before = whole + 1
    for tp in (1, 2, 4, 8):
        held = stage_elements(tensor_shard(config, tp), layers, 1)
        assert whole <= held * tp
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
        tensor_shard(LLAMA, tp)


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide intermediate_size = 90, got 4"):
        tensor_shard(replace(LLAMA, intermediate_size=90), 4)


@pytest.mark.parametrize("pp", [0, 7])
def test_more_stages_than_layers_are_refused(pp: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[1, 6\], the number of layers, got {pp}"):
        split_layers(LLAMA, pp)
