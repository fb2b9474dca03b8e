"""`linear` against its reference: on the CPU alone."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import Draw, each_dtype, random_cases


def check(
    draw: Draw, dtype: torch.dtype, num_rows: int, in_features: int, out_features: int
) -> None:
    input = draw.strided(draw.normal(num_rows, in_features, dtype=dtype))
    weight = draw.strided(draw.normal(out_features, in_features, dtype=dtype))
    bias = draw.choice((None, draw.normal(out_features, dtype=dtype)))
    before = input.clone(), weight.clone()
    out = draw.output(num_rows, out_features, dtype=dtype)
    ops.linear(out, input, weight, bias)
    expected = torch.empty(num_rows, out_features, dtype=torch.float64)
    reference.linear(expected, input, weight, bias)
    assert_close(out, expected)
    assert_gaps_untouched(out)
    assert_equal_bits(input, before[0])
    assert_equal_bits(weight, before[1])


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 100])
def test_rows(dtype: torch.dtype, seed: int, num_rows: int) -> None:
    check(Draw(seed, "cpu"), dtype, num_rows, 576, 192)


@each_dtype
@pytest.mark.parametrize("in_features", [1, 7, 8, 9, 63, 64, 65, 1536])
def test_in_features(dtype: torch.dtype, seed: int, in_features: int) -> None:
    draw = Draw(seed, "cpu")
    check(draw, dtype, draw.choice((1, 3, 8)), in_features, draw.choice((64, 71)))


@each_dtype
@random_cases(10)
def test_random_shapes(dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, "cpu")
    check(draw, dtype, draw.between(1, 40), draw.between(16, 1000), draw.between(16, 500))


@each_dtype
def test_nothing_to_do(dtype: torch.dtype) -> None:
    ops.linear(
        torch.empty(0, 5, dtype=dtype),
        torch.empty(0, 8, dtype=dtype),
        torch.ones(5, 8, dtype=dtype),
    )


@each_dtype
def test_no_in_features(dtype: torch.dtype, seed: int) -> None:
    """An empty sum is zero."""
    bias = Draw(seed, "cpu").normal(5, dtype=dtype)
    out = torch.full((2, 5), torch.nan, dtype=dtype)
    ops.linear(out, torch.empty(2, 0, dtype=dtype), torch.empty(5, 0, dtype=dtype), bias)
    assert_equal_bits(out, bias.expand(2, 5))


@pytest.mark.cuda
def test_refuses_a_gpu() -> None:
    ones = torch.ones(2, 2, device="cuda")
    with pytest.raises(ValueError, match="linear runs on the CPU alone, got a tensor on cuda:0"):
        ops.linear(torch.empty(2, 2, device="cuda"), ones, ones)
