"""`silu_and_mul` and `gelu_and_mul` against their references."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import Draw, each_dtype, random_cases

GatedActivation = Callable[[torch.Tensor, torch.Tensor], None]

each_activation = pytest.mark.parametrize(
    ("op", "oracle"),
    [
        (ops.silu_and_mul, reference.silu_and_mul),
        (ops.gelu_and_mul, reference.gelu_and_mul),
        (
            partial(ops.gelu_and_mul, approximate="tanh"),
            partial(reference.gelu_and_mul, approximate="tanh"),
        ),
    ],
    ids=["silu", "gelu", "gelu tanh"],
)


def check(draw: Draw, op: GatedActivation, oracle: GatedActivation, input: torch.Tensor) -> None:
    input = draw.strided(input)
    before = input.clone()
    shape = (input.shape[0], input.shape[1] // 2)
    out = draw.output(*shape, dtype=input.dtype)
    op(out, input)
    expected = torch.empty(shape, dtype=torch.float64, device=draw.device)
    oracle(expected, input)
    assert_close(out, expected)
    assert_gaps_untouched(out)
    assert_equal_bits(input, before)


@each_dtype
@each_activation
@pytest.mark.parametrize("intermediate_size", [1, 7, 8, 63, 64, 1025, 1536])
def test_sizes(
    device: str,
    dtype: torch.dtype,
    seed: int,
    op: GatedActivation,
    oracle: GatedActivation,
    intermediate_size: int,
) -> None:
    draw = Draw(seed, device)
    num_tokens = draw.choice((1, 2, 17, 65))
    check(draw, op, oracle, draw.normal(num_tokens, 2 * intermediate_size, dtype=dtype))


@each_dtype
@each_activation
@random_cases(3)
def test_random_shapes(
    device: str,
    dtype: torch.dtype,
    seed: int,
    op: GatedActivation,
    oracle: GatedActivation,
    case: int,
) -> None:
    draw = Draw(seed, device)
    shape = (draw.between(1, 100), 2 * draw.between(1, 2000))
    check(draw, op, oracle, draw.normal(*shape, dtype=dtype) * draw.choice((0.05, 1.0, 4.0)))


@each_dtype
@each_activation
def test_every_gate(
    device: str, dtype: torch.dtype, op: GatedActivation, oracle: GatedActivation
) -> None:
    """From deep in the tail, where the exponential overflows, to the other end: no NaN, the right
    sign, and nothing lost to cancellation that dtype can hold.
    """
    gate = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-3e4, -200, -89, 89, 200, 3e4])))
    input = torch.cat((gate, torch.ones_like(gate)))[None].to(device, dtype)
    out = torch.full((1, len(gate)), torch.nan, dtype=dtype, device=device)
    op(out, input)
    expected = torch.empty(1, len(gate), dtype=torch.float64, device=device)
    oracle(expected, input)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(
        out.double(),
        expected,
        rtol={torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype],
        atol={torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}[dtype],
    )


@each_dtype
@each_activation
def test_no_tokens(
    device: str, dtype: torch.dtype, op: GatedActivation, oracle: GatedActivation
) -> None:
    op(
        torch.empty(0, 8, dtype=dtype, device=device),
        torch.empty(0, 16, dtype=dtype, device=device),
    )
