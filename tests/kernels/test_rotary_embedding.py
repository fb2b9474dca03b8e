"""`rotary_embedding` against its reference."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import SENTINEL, Draw, each_dtype, random_cases

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_POSITION = 500


def cos_sin_cache(draw: Draw, rotary_dim: int) -> torch.Tensor:
    """Angles of a base of 10000, and not of length one: yarn scales cosines and sines."""
    inv_freq = 10000 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.outer(torch.arange(MAX_POSITION), inv_freq)
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * draw.choice((1.0, 1.2))
    return cache.float().to(draw.device)


def check(
    draw: Draw,
    dtype: torch.dtype,
    is_neox: bool,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
) -> None:
    cache = cos_sin_cache(draw, rotary_dim)
    positions = draw.integers(0, MAX_POSITION - 1, num_tokens, dtype=torch.int64)
    query, key = (
        draw.strided(draw.normal(num_tokens, heads, head_dim, dtype=dtype), SENTINEL)
        for heads in (num_heads, num_kv_heads)
    )
    before = query.clone(), key.clone()
    expected = query.double(), key.double()
    reference.rotary_embedding(positions, *expected, cache, is_neox)
    ops.rotary_embedding(positions, query, key, cache, is_neox)
    for i, heads in enumerate((query, key)):
        assert_close(heads, expected[i])
        assert_equal_bits(heads[..., rotary_dim:], before[i][..., rotary_dim:])
        assert_gaps_untouched(heads)


@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
def test_head_dims(
    device: str, dtype: torch.dtype, seed: int, head_dim: int, is_neox: bool
) -> None:
    check(Draw(seed, device), dtype, is_neox, 9, 6, 2, head_dim, head_dim)


@each_dtype
@random_cases(6)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
def test_random_shapes(
    device: str, dtype: torch.dtype, seed: int, is_neox: bool, case: int
) -> None:
    """A part of the head rotated, any number of heads."""
    draw = Draw(seed, device)
    head_dim = draw.choice((*HEAD_DIMS, 6, 20, 36))
    rotary_dim = draw.choice((head_dim, 2 * draw.between(1, head_dim // 2)))
    heads = draw.choice(((1, 1), (9, 3), (32, 1), (7, 7)))
    check(draw, dtype, is_neox, draw.choice((1, 2, 17, 130)), *heads, head_dim, rotary_dim)


@each_dtype
def test_slices_of_a_fused_projection(device: str, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, device)
    qkv = draw.normal(11, (6 + 2 + 2) * 64, dtype=dtype)
    before = qkv.clone()
    query, key, _ = (part.unflatten(1, (-1, 64)) for part in qkv.split([384, 128, 128], dim=1))
    expected = query.double(), key.double()
    cache = cos_sin_cache(draw, 64)
    positions = torch.arange(11, device=device)
    reference.rotary_embedding(positions, *expected, cache)
    ops.rotary_embedding(positions, query, key, cache)
    assert_close(query, expected[0])
    assert_close(key, expected[1])
    assert_equal_bits(qkv[:, 512:], before[:, 512:])


@each_dtype
def test_no_tokens(device: str, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, device)
    query = torch.empty(0, 2, 64, dtype=dtype, device=device)
    positions = torch.empty(0, dtype=torch.int64, device=device)
    ops.rotary_embedding(positions, query, query.clone(), cos_sin_cache(draw, 64))


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
def test_reference_is_complex_multiplication(seed: int, is_neox: bool) -> None:
    draw = Draw(seed, "cpu")
    query = draw.normal(5, 2, 8, dtype=torch.float64)
    key = query.clone()
    cache = cos_sin_cache(draw, 8)
    positions = draw.integers(0, MAX_POSITION - 1, 5, dtype=torch.int64)
    pairs = (
        query.unflatten(-1, (2, 4)).transpose(-1, -2) if is_neox else query.unflatten(-1, (4, 2))
    )
    turn = torch.complex(*cache[positions].double()[:, None].chunk(2, dim=-1))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = (turned.transpose(-1, -2) if is_neox else turned).flatten(-2)
    reference.rotary_embedding(positions, query, key, cache, is_neox)
    torch.testing.assert_close(query, expected)
    torch.testing.assert_close(key, expected)
