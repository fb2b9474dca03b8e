"""`rms_norm` and `fused_add_rms_norm` against their references."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import SENTINEL, Draw, each_dtype, random_cases

HIDDEN_SIZES = (1, 2, 7, 8, 64, 80, 129, 576, 1023, 1024, 4096, 8192)


def draw_shape(draw: Draw, hidden_size: int) -> tuple[int, ...]:
    heads = draw.choice(((), (1,), (3,), (9,)))
    return (draw.choice((1, 2, 7, 33)), *heads, hidden_size)


@each_dtype
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_rms_norm(device: str, dtype: torch.dtype, seed: int, hidden_size: int) -> None:
    draw = Draw(seed, device)
    shape = draw_shape(draw, hidden_size)
    weight = draw.normal(hidden_size, dtype=dtype)
    eps = draw.choice((1e-6, 1e-5, 0.0, 1.0))
    input = draw.strided(draw.normal(*shape, dtype=dtype) * draw.choice((0.01, 1.0, 30.0)))
    before = input.clone()
    out = draw.output(*shape, dtype=dtype)
    ops.rms_norm(out, input, weight, eps)
    expected = torch.empty(shape, dtype=torch.float64, device=device)
    reference.rms_norm(expected, input, weight, eps)
    assert_close(out, expected)
    assert_gaps_untouched(out)
    assert_equal_bits(input, before)

    ops.rms_norm(input, input, weight, eps)
    assert_equal_bits(input, out)


@each_dtype
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_fused_add_rms_norm(
    device: str, dtype: torch.dtype, seed: int, hidden_size: int, in_place: bool
) -> None:
    draw = Draw(seed, device)
    shape = (draw.choice((1, 2, 7, 33)), hidden_size)
    weight = draw.normal(hidden_size, dtype=dtype)
    input = draw.strided(draw.normal(*shape, dtype=dtype), SENTINEL)
    residual = draw.strided(3 * draw.normal(*shape, dtype=dtype), SENTINEL)
    expected = torch.empty(shape, dtype=torch.float64, device=device)
    expected_residual = residual.clone()
    reference.fused_add_rms_norm(expected, input, expected_residual, weight, 1e-5)

    out = input if in_place else draw.output(*shape, dtype=dtype)
    ops.fused_add_rms_norm(out, input, residual, weight, 1e-5)
    assert_close(out, expected)
    assert_equal_bits(residual, expected_residual)
    assert_gaps_untouched(out)
    assert_gaps_untouched(residual)


@each_dtype
@random_cases(6)
def test_random_shapes(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    shape = draw_shape(draw, draw.between(1, 3000))
    input = draw.strided(draw.normal(*shape, dtype=dtype))
    weight = draw.normal(shape[-1], dtype=dtype)
    out = draw.output(*shape, dtype=dtype)
    ops.rms_norm(out, input, weight, 1e-6)
    expected = torch.empty(shape, dtype=torch.float64, device=device)
    reference.rms_norm(expected, input, weight, 1e-6)
    assert_close(out, expected)
    assert_gaps_untouched(out)


@each_dtype
def test_large_values(device: str, dtype: torch.dtype, seed: int) -> None:
    """Squares beyond float16's range are summed in float32; a row of zeros stays zero."""
    draw = Draw(seed, device)
    input = 3000 * draw.normal(3, 500, dtype=dtype)
    input[1] = 0
    weight = draw.normal(500, dtype=dtype)
    out = draw.output(3, 500, dtype=dtype)
    ops.rms_norm(out, input, weight, 1e-6)
    expected = torch.empty(3, 500, dtype=torch.float64, device=device)
    reference.rms_norm(expected, input, weight, 1e-6)
    assert_close(out[::2], expected[::2])
    assert_equal_bits(out[1].abs(), torch.zeros_like(out[1]))


@each_dtype
def test_no_rows(device: str, dtype: torch.dtype) -> None:
    empty = torch.empty(0, 64, dtype=dtype, device=device)
    weight = torch.ones(64, dtype=dtype, device=device)
    ops.rms_norm(empty.clone(), empty, weight, 1e-6)
    ops.fused_add_rms_norm(empty.clone(), empty, empty.clone(), weight, 1e-6)


def test_reference_is_torch(seed: int) -> None:
    draw = Draw(seed, "cpu")
    input, weight = draw.normal(5, 64, dtype=torch.float64), draw.normal(64, dtype=torch.float64)
    out = torch.empty_like(input)
    reference.rms_norm(out, input, weight, 0.1)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(input, (64,), weight, 0.1))
