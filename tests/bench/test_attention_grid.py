"""The shapes that are timed are the ones their names say, and their bytes and FLOPs are counted
right.
"""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from nano_vllm.bench import attention_grid, kernels
from nano_vllm.bench.attention_grid import MODELS, Heads, decode, mixed, prefill


def test_skewed_mix_holds_the_lengths_it_says() -> None:
    skewed = [shape for shape in attention_grid.DECODES if not shape.is_even]
    assert [shape.name for shape in skewed] == ["102400 + 255 x 1024"]
    assert skewed[0].seq_lens == (102400,) + (1024,) * 255
    assert skewed[0].query_len == 1


def test_balanced_batch_beside_it_has_the_same_bytes() -> None:
    names = [shape.name for shape in attention_grid.DECODES]
    at = names.index("102400 + 255 x 1024")
    skewed, balanced = attention_grid.DECODES[at : at + 2]
    assert balanced.is_even
    assert len(balanced.seq_lens) == len(skewed.seq_lens)
    heads = Heads(4, 2, 64)
    assert balanced.kv_bytes(heads, 2) == skewed.kv_bytes(heads, 2) == 2 * 363520 * 2 * 64 * 2


def test_grid_is_the_documented_one() -> None:
    sizes = {(len(s.seq_lens), s.seq_lens[0]) for s in attention_grid.DECODES if s.is_even}
    expected = {(b, c) for b in (1, 8, 64, 256) for c in (1024, 8192, 32768)}
    assert sizes == expected - {(256, 32768)} | {(256, 1420)}
    assert [(s.name, s.query_len, s.seq_lens[0]) for s in attention_grid.PREFILLS] == [
        ("16 x 1024", 1024, 1024),
        ("4 x 4096", 4096, 4096),
        ("1 x 8192", 8192, 8192),
        ("1 x 32768", 32768, 32768),
        ("1 x 2048 on 30720", 2048, 32768),
    ]


@pytest.mark.parametrize(
    "shape",
    [
        decode(3, 5),
        prefill(2, 7),
        prefill(2, 3, prefix=4),
        mixed(decode(3, 5), prefill(2, 3, prefix=4))[0],
    ],
)
def test_flops_count_what_the_mask_leaves(shape: attention_grid.AttentionShape) -> None:
    seen = sum(
        position + 1
        for length, query_len in zip(shape.seq_lens, shape.query_lens, strict=True)
        for position in range(length - query_len, length)
    )
    assert shape.flops(Heads(6, 2, 64)) == 2 * 2 * seen * 6 * 64


def heads_for(*options: str, on_gpu: bool = True) -> list[Heads]:
    parser = ArgumentParser()
    kernels.add_arguments(parser)
    return kernels.chosen_heads(parser.parse_args(options), on_gpu)


def test_models_are_chosen_by_name() -> None:
    assert heads_for() == [Heads(32, 8, 128)]
    assert heads_for(on_gpu=False) == [Heads(9, 3, 64)]
    assert heads_for("--models", "smollm2", "64-heads") == [Heads(9, 3, 64), Heads(64, 8, 128)]
    assert heads_for("--models", "all") == list(MODELS.values())


def test_single_numbers_override_the_model() -> None:
    assert heads_for("--head-dim", "64") == [Heads(32, 8, 64)]
    every = ["--num-heads", "8", "--num-kv-heads", "2", "--head-dim", "96"]
    assert heads_for("--models", "all", *every) == [Heads(8, 2, 96)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-heads", "12"], "multiple of --num-kv-heads, got 12 and 8"),
        (["--num-kv-heads", "0"], "at least 1, got 32/0x128"),
    ],
)
def test_impossible_heads_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heads_for(*options)
