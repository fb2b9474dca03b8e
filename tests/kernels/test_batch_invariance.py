"""Same request, same bits: what else is in the batch does not change a row."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests.kernels.attention_batch import CachedSequence, HeadShape, draw_sequence, page
from tests.kernels.compare import assert_equal_bits
from tests.kernels.draw import Draw, each_cache, each_dtype, random_cases

HEADS = HeadShape(6, 2, 64)
SEQ_LENS = (1, 15, 16, 17, 100, 511, 512, 513, 1025, 3000)

each_out_layout = pytest.mark.parametrize("out_layout", ["dense", "odd"])
"""On sm_90 its own kernels take the first and those of sm_80 and newer the second."""


def attend(
    draw: Draw, sequences: list[CachedSequence], window: int, float8: bool, out_layout: str
) -> list[torch.Tensor]:
    """Each sequence's output, on random blocks in the memory layout that the engine has."""
    scale = torch.tensor([0.05, 0.02], device=draw.device) if float8 else None
    batch = page(
        draw,
        sequences,
        16,
        cache_layout="heads first",
        query_layout="dense",
        sliding_window=window,
        float8=float8,
        k_scale=scale,
        v_scale=scale,
    )
    return list(batch.run(out_layout).split([len(sequence.query) for sequence in sequences]))


def assert_unchanged_in(
    draw: Draw,
    sequences: list[CachedSequence],
    alone: list[torch.Tensor],
    others: list[CachedSequence],
    window: int,
    float8: bool,
    out_layout: str,
) -> None:
    """The sequences give the same bits among the others, in random order."""
    batch = sequences + others
    order = draw.sample(len(batch), len(batch))
    together = attend(draw, [batch[i] for i in order], window, float8, out_layout)
    for i, expected in enumerate(alone):
        assert_equal_bits(together[order.index(i)], expected)


@each_out_layout
@each_dtype
@each_cache
@pytest.mark.parametrize("window", [0, 300])
def test_decode(
    device: str, dtype: torch.dtype, float8: bool, seed: int, window: int, out_layout: str
) -> None:
    draw = Draw(seed, device)
    decodes = [draw_sequence(draw, 1, seq_len, HEADS, dtype) for seq_len in SEQ_LENS]
    alone = [attend(draw, [sequence], window, float8, out_layout)[0] for sequence in decodes]
    assert_unchanged_in(draw, decodes, alone, [], window, float8, out_layout)
    many = [draw_sequence(draw, 1, draw.between(1, 60), HEADS, dtype) for _ in range(80)]
    assert_unchanged_in(draw, decodes, alone, many, window, float8, out_layout)
    prefill = draw_sequence(draw, 70, 90, HEADS, dtype)
    assert_unchanged_in(draw, decodes, alone, [prefill], window, float8, out_layout)


@each_out_layout
@each_dtype
@each_cache
@pytest.mark.parametrize("window", [0, 40])
def test_prefill(
    device: str, dtype: torch.dtype, float8: bool, seed: int, window: int, out_layout: str
) -> None:
    draw = Draw(seed, device)
    lengths = ((2, 2), (16, 16), (17, 40), (63, 1000), (130, 130))
    prefills = [draw_sequence(draw, *pair, HEADS, dtype) for pair in lengths]
    alone = [attend(draw, [sequence], window, float8, out_layout)[0] for sequence in prefills]
    assert_unchanged_in(draw, prefills, alone, [], window, float8, out_layout)
    others = [
        draw_sequence(draw, query_len, query_len + draw.between(0, 50), HEADS, dtype)
        for query_len in (0, 1, 1, 3, 200)
    ]
    assert_unchanged_in(draw, prefills, alone, others, window, float8, out_layout)


@each_out_layout
@each_dtype
@each_cache
def test_broken_neighbour(
    device: str, dtype: torch.dtype, float8: bool, seed: int, out_layout: str
) -> None:
    """NaN and infinity in one sequence stay there."""
    draw = Draw(seed, device)
    sequences = [draw_sequence(draw, *pair, HEADS, dtype) for pair in ((1, 40), (1, 600), (20, 50))]
    alone = [attend(draw, [sequence], 0, float8, out_layout)[0] for sequence in sequences]
    broken = [draw_sequence(draw, *pair, HEADS, dtype) for pair in ((1, 33), (1, 500), (40, 60))]
    for sequence in broken:
        sequence.query[0] = torch.nan
        sequence.keys[3] = torch.inf
        sequence.values[5] = torch.nan
    assert_unchanged_in(draw, sequences, alone, broken, 0, float8, out_layout)


@each_dtype
@random_cases(4)
def test_rms_norm(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    hidden_size = draw.between(1, 3000)
    rows = draw.normal(37, hidden_size, dtype=dtype)
    weight = draw.normal(hidden_size, dtype=dtype)
    together = torch.empty_like(rows)
    ops.rms_norm(together, rows, weight, 1e-6)
    for i in range(len(rows)):
        alone = torch.empty_like(rows[:1])
        ops.rms_norm(alone, rows[i : i + 1], weight, 1e-6)
        assert_equal_bits(alone, together[i : i + 1])


@each_dtype
@random_cases(4)
def test_linear(dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, "cpu")
    in_features, out_features = draw.between(1, 700), draw.between(1, 300)
    rows = draw.normal(draw.between(2, 40), in_features, dtype=dtype)
    weight = draw.normal(out_features, in_features, dtype=dtype)
    together = rows.new_empty(len(rows), out_features)
    ops.linear(together, rows, weight)
    for start in range(len(rows)):
        some = rows[start : start + draw.choice((1, 1, 2, 3, 5, 8))]
        out = some.new_empty(len(some), out_features)
        ops.linear(out, some, weight)
        assert_equal_bits(out, together[start : start + len(some)])
