"""`quantized_linear` against the dequantized product."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from nano_vllm.quantization.packed_weight import GROUP_SIZE, QuantizedWeight, pack
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import Draw, each_dtype

ROWS = (1, 2, 3, 7, 8, 9, 16, 33)


def draw_weight(draw: Draw, bits: int, out_features: int, in_features: int) -> QuantizedWeight:
    groups = (out_features, in_features // GROUP_SIZE)
    return QuantizedWeight(
        bits,
        draw.integers(0, 2**bits - 1, out_features, in_features, dtype=torch.uint8),
        (draw.normal(*groups, dtype=torch.float32) / 2**bits).half(),
        draw.normal(*groups, dtype=torch.float16),
    )


def rounded(input: torch.Tensor) -> torch.Tensor:
    """The input as the op takes it, in 8 bits a group; float64."""
    groups = input.float().unflatten(-1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((groups * inverse).round().double() * scale.double()).flatten(-2)


@each_dtype
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", ROWS)
def test_quantized_linear(dtype: torch.dtype, bits: int, num_rows: int, seed: int) -> None:
    draw = Draw(seed, "cpu")
    out_features, in_features = draw.between(1, 70), GROUP_SIZE * draw.between(1, 9)
    weight = draw_weight(draw, bits, out_features, in_features)
    input = draw.strided(draw.normal(num_rows, in_features, dtype=dtype))
    bias = draw.choice((None, draw.normal(out_features, dtype=dtype)))
    out = draw.output(num_rows, out_features, dtype=dtype)
    ops.quantized_linear(out, input, pack([weight]), bias)
    expected = torch.empty(num_rows, out_features, dtype=torch.float64)
    reference.linear(
        expected, rounded(input), weight.dequantize().double(), None if bias is None else bias
    )
    assert_gaps_untouched(out)
    error = (out.double() - expected).abs()
    # Rounding to 8 bits may go either way where float32 and the op differ in the last place.
    near = 0.02 * expected.abs().amax() + 0.02
    assert bool((error <= near).all())
    if dtype is torch.float32:
        assert float(error.median()) <= 1e-4 * float(expected.abs().amax())


@pytest.mark.parametrize("bits", [4, 8])
def test_exact_where_eight_bits_are(bits: int, seed: int) -> None:
    """Inputs that are multiples of a power of two are not rounded: the product is exact."""
    draw = Draw(seed, "cpu")
    weight = draw_weight(draw, bits, 50, 96)
    input = draw.integers(-127, 127, 5, 96, dtype=torch.float32) / 8
    input[:, ::GROUP_SIZE] = 127 / 8
    out = draw.output(5, 50, dtype=torch.float32)
    ops.quantized_linear(out, input, pack([weight]))
    expected = torch.empty(5, 50, dtype=torch.float64)
    reference.linear(expected, input, weight.dequantize())
    assert_close(out, expected)


def test_shards_lie_one_after_the_other(seed: int) -> None:
    """Rows of several tensors, of 4 and of 8 bits, in one product."""
    draw = Draw(seed, "cpu")
    shards = [draw_weight(draw, bits, rows, 64) for bits, rows in ((4, 24), (8, 5), (4, 16))]
    input = draw.normal(3, 64, dtype=torch.float32)
    out, parts = torch.empty(3, 45), [torch.empty(3, len(s.quants)) for s in shards]
    ops.quantized_linear(out, input, pack(shards))
    for shard, part in zip(shards, parts, strict=True):
        ops.quantized_linear(part, input, pack([shard]))
    assert_equal_bits(out, torch.cat(parts, dim=1))


@each_dtype
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, "cpu")
    packed = pack([draw_weight(draw, 4, 40, 64)])
    input = draw.normal(21, 64, dtype=dtype)
    input[4, 3] = torch.nan
    input[9] = torch.inf
    out = torch.empty(21, 40, dtype=dtype)
    ops.quantized_linear(out, input, packed)
    assert bool(out[[4, 9]].isnan().all())
    for row in range(21):
        alone = torch.empty(1, 40, dtype=dtype)
        ops.quantized_linear(alone, input[row : row + 1], packed)
        assert_equal_bits(alone[0], out[row])


def test_zeros(seed: int) -> None:
    packed = pack([draw_weight(Draw(seed, "cpu"), 8, 16, 32)])
    out = torch.full((2, 16), torch.nan)
    ops.quantized_linear(out, torch.zeros(2, 32), packed)
    assert_equal_bits(out.abs(), torch.zeros(2, 16))
