"""`linear` and its gated form against their reference."""

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


# On CUDA.

each_16_bit_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def padded_rows(draw: Draw, tensor: torch.Tensor) -> torch.Tensor:
    """The same values in rows that begin at multiples of 16 bytes, NaN between them."""
    rows, columns = tensor.shape
    memory = torch.full(
        (rows, columns + 8 * draw.between(0, 2)), torch.nan, dtype=tensor.dtype, device="cuda"
    )
    memory[:, :columns] = tensor
    return memory[:, :columns]


def check_on_cuda(
    draw: Draw,
    dtype: torch.dtype,
    num_rows: int,
    in_features: int,
    out_features: int,
    is_gated: bool,
) -> None:
    input = padded_rows(draw, draw.normal(num_rows, in_features, dtype=dtype))
    weight_rows = out_features * (2 if is_gated else 1)
    # Products of size 1, which fit float16.
    weight = padded_rows(
        draw, draw.normal(weight_rows, in_features, dtype=dtype) * in_features**-0.5
    )
    bias = None if is_gated else draw.choice((None, draw.normal(out_features, dtype=dtype)))
    memory = torch.full((num_rows + 2, out_features + 8), torch.nan, dtype=dtype, device="cuda")
    out = memory[1:-1, :out_features]
    torch.cuda.synchronize()  # weights are at rest
    if is_gated:
        ops.linear_silu_and_mul(out, input, weight)
    else:
        ops.linear(out, input, weight, bias)
    product = torch.empty(num_rows, weight_rows, dtype=torch.float64, device="cuda")
    reference.linear(product, input, weight, bias)
    if is_gated:
        expected = product.new_empty(num_rows, out_features)
        reference.silu_and_mul(expected, product)
    else:
        expected = product
    assert_close(out, expected)
    assert bool(memory[0].isnan().all() and memory[-1].isnan().all())
    assert bool(memory[:, out_features:].isnan().all())


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32])
def test_rows_on_cuda(dtype: torch.dtype, seed: int, is_gated: bool, num_rows: int) -> None:
    draw = Draw(seed, "cuda")
    for in_features, out_features in ((1024, 3072), (2048, 1024), (576, 192), (4096, 14336)):
        check_on_cuda(draw, dtype, num_rows, in_features, out_features, is_gated)


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("is_gated", [False, True])
@random_cases(30)
def test_random_shapes_on_cuda(dtype: torch.dtype, seed: int, case: int, is_gated: bool) -> None:
    draw = Draw(seed, "cuda")
    num_rows = draw.between(1, 32)
    in_features, out_features = 8 * draw.between(1, 500), 8 * draw.between(1, 700)
    check_on_cuda(draw, dtype, num_rows, in_features, out_features, is_gated)


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("num_rows", [33, 64, 127, 128, 129, 256, 257, 1000, 4097])
def test_many_rows_on_cuda(dtype: torch.dtype, seed: int, num_rows: int) -> None:
    draw = Draw(seed, "cuda")
    for in_features, out_features in ((1024, 3072), (576, 192), (8, 32), (200, 992)):
        check_on_cuda(draw, dtype, num_rows, in_features, out_features, is_gated=True)


@pytest.mark.cuda
@each_16_bit_dtype
@random_cases(30)
def test_random_shapes_of_many_rows_on_cuda(dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, "cuda")
    num_rows = draw.between(33, draw.choice((100, 700, 5000)))
    in_features, out_features = 8 * draw.between(1, 300), 32 * draw.between(1, 75)
    check_on_cuda(draw, dtype, num_rows, in_features, out_features, is_gated=True)


@pytest.mark.cuda
@each_16_bit_dtype
def test_row_of_many_on_cuda(dtype: torch.dtype, seed: int) -> None:
    """A row's bits do not depend on the others, from 33 on."""
    draw = Draw(seed, "cuda")
    for in_features, out_features in ((1024, 1024), (200, 6016)):
        rows = draw.normal(2000, in_features, dtype=dtype)
        weight = draw.normal(2 * out_features, in_features, dtype=dtype)
        torch.cuda.synchronize()
        together = rows.new_empty(2000, out_features)
        ops.linear_silu_and_mul(together, rows, weight)
        for count in (33, 128, 300, 1999):
            some = rows.new_empty(count, out_features)
            ops.linear_silu_and_mul(some, rows[2000 - count :], weight)
            assert_equal_bits(some, together[2000 - count :])


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("is_gated", [False, True])
def test_row_alone_on_cuda(dtype: torch.dtype, seed: int, is_gated: bool) -> None:
    """A row's bits do not depend on the others, whatever kernel their number takes."""
    draw = Draw(seed, "cuda")
    for in_features, out_features in ((1024, 1024), (3072, 1024), (200, 6000)):
        rows = draw.normal(32, in_features, dtype=dtype)
        weight = draw.normal(out_features * (2 if is_gated else 1), in_features, dtype=dtype)
        torch.cuda.synchronize()
        op = ops.linear_silu_and_mul if is_gated else ops.linear
        together = rows.new_empty(32, out_features)
        op(together, rows, weight)
        for count in (1, 3, 8, 9, 16, 17, 30):
            some = rows[:count].new_empty(count, out_features)
            op(some, rows[32 - count :], weight)
            assert_equal_bits(some, together[32 - count :])


def layers_of(draw: Draw, dtype: torch.dtype, start: torch.Tensor, pauses: bool) -> torch.Tensor:
    """Twenty feed-forward blocks on a residual stream."""
    up, down = (
        draw.normal(rows, columns, dtype=dtype) * columns**-0.5
        for rows, columns in ((8192, 1024), (1024, 4096))
    )
    norm_weight = draw.normal(1024, dtype=dtype)
    x, hidden, wide = torch.zeros_like(start), start.clone(), start.new_empty(len(start), 4096)

    def normalise() -> None:
        ops.fused_add_rms_norm(x, x, hidden, norm_weight, 1e-6)

    def widen() -> None:
        ops.linear_silu_and_mul(wide, x, up)

    def narrow() -> None:
        if len(x) > ops.linear_max_rows(down):
            torch.mm(wide, down.T, out=x)
        else:
            ops.linear(x, wide, down)

    torch.cuda.synchronize()
    for _ in range(20):
        for step in (normalise, widen, narrow):
            step()
            if pauses:
                torch.cuda.synchronize()
    return hidden


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("num_rows", [1, 8, 12, 30, 300])
def test_chain_on_cuda(dtype: torch.dtype, seed: int, num_rows: int) -> None:
    """Kernels that start before the one ahead has ended see all of its results: as one by one."""
    start = Draw(seed, "cuda").normal(num_rows, 1024, dtype=dtype)
    expected = layers_of(Draw(seed, "cuda"), dtype, start, pauses=True)
    for _ in range(5):
        assert_equal_bits(layers_of(Draw(seed, "cuda"), dtype, start, pauses=False), expected)


def test_max_rows(device: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((64, 64), (72, 8), (7, 64), (64, 7)):
            max_rows = ops.linear_max_rows(torch.empty(shape, dtype=dtype, device=device))
            if device == "cpu":
                assert max_rows == 32
            else:
                is_hopper = torch.cuda.get_device_capability() == (9, 0)
                fits = dtype != torch.float32 and shape[0] % 8 == shape[1] % 8 == 0
                assert max_rows == (32 if is_hopper and fits else 0)


def test_where_the_gated_product_pays(device: str) -> None:
    """From few rows to many, for a weight that there are kernels for."""
    for dtype, shape, fits in (
        (torch.bfloat16, (28672, 4096), True),
        (torch.float16, (6144, 1024), True),
        (torch.float32, (6144, 1024), False),
        (torch.bfloat16, (24, 64), False),  # 12 output features
        (torch.bfloat16, (6144, 1020), False),
    ):
        weight = torch.empty(shape, dtype=dtype, device=device)
        takes = device == "cuda" and torch.cuda.get_device_capability() == (9, 0) and fits
        for num_rows in (1, 32):
            assert ops.linear_silu_and_mul_pays(weight, num_rows) == takes
        if not takes:
            assert not any(ops.linear_silu_and_mul_pays(weight, 2**n) for n in range(6, 16))


@pytest.mark.cuda
def test_refusals_on_cuda() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    float32 = torch.float32
    with pytest.raises(ValueError, match=r"needs sm_90, .*got float32 and a weight of .8, 8."):
        ops.linear(*(empty(8, 8, dtype=float32) for _ in range(3)))
    with pytest.raises(ValueError, match=r"multiples of 8, got float16 and a weight of .8, 12."):
        ops.linear(empty(2, 8), empty(2, 12), empty(8, 12))
    with pytest.raises(ValueError, match="linear takes at most 32 rows on CUDA, got 33"):
        ops.linear(empty(33, 8), empty(33, 8), empty(8, 8))
    with pytest.raises(
        ValueError, match=r"input must begin at a multiple of 16 bytes .*stride of 9"
    ):
        ops.linear(empty(2, 8), empty(2, 9)[:, :8], empty(8, 8))
    with pytest.raises(ValueError, match="weight must hold gate and up, got 9 rows"):
        ops.linear_silu_and_mul(empty(2, 4), empty(2, 8), empty(9, 8))
    with pytest.raises(
        ValueError, match="of 33 rows needs an intermediate size in multiples of 32, got 40"
    ):
        ops.linear_silu_and_mul(empty(33, 40), empty(33, 8), empty(80, 8))


def test_what_a_cpu_refuses() -> None:
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"linear_silu_and_mul runs on CUDA alone, got .* cpu"):
        ops.linear_silu_and_mul(torch.empty(2, 1), ones, ones)
