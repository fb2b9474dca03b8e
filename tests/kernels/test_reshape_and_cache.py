"""`reshape_and_cache` against its reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import FLOAT8, SENTINEL, Draw, each_cache, each_dtype, random_cases


def check(
    draw: Draw,
    dtype: torch.dtype,
    num_tokens: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    float8: bool,
) -> None:
    """Writes random tokens, some of them padding, into random slots of a cache of sentinels."""
    num_blocks = -(-num_tokens // block_size) + draw.between(1, 4)
    slots = draw.sample(num_blocks * block_size, num_tokens)
    slots = [draw.choice((-1, -7, -(2**40))) if draw.between(1, 8) == 1 else s for s in slots]
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device=draw.device)
    key, value = (
        draw.strided(draw.normal(num_tokens, num_kv_heads, head_dim, dtype=dtype)) for _ in range(2)
    )
    scales = {
        name: draw.scales(num_kv_heads)
        for name in ("k_scale", "v_scale")
        if float8 and draw.choice((True, True, False))
    }
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    cache_dtype = FLOAT8 if float8 else dtype
    untouched = torch.full(shape, SENTINEL, dtype=cache_dtype, device=draw.device)
    if draw.choice((True, False)):
        heads_first = draw.strided(untouched.transpose(1, 2), SENTINEL, "dense")
        key_cache, value_cache = (heads_first.clone().transpose(1, 2) for _ in range(2))
    else:
        key_cache, value_cache = (draw.strided(untouched, SENTINEL) for _ in range(2))

    ops.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, **scales)
    expected_keys, expected_values = untouched.clone(), untouched.clone()
    reference.reshape_and_cache(key, value, expected_keys, expected_values, slot_mapping, **scales)
    assert_equal_bits(key_cache, expected_keys)
    assert_equal_bits(value_cache, expected_values)
    assert_gaps_untouched(key_cache)
    assert_gaps_untouched(value_cache)


@each_dtype
@each_cache
@random_cases(15)
def test_random_slots(device: str, dtype: torch.dtype, float8: bool, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    head_dim = draw.choice((64, 80, 96, 128, 192, 256, 1, 7, 36))
    block_size = draw.choice((1, 8, 16, 32, 64, 128, 256))
    check(
        draw, dtype, draw.between(1, 150), draw.choice((1, 2, 3, 8)), head_dim, block_size, float8
    )


@each_dtype
@each_cache
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 1000])
def test_edge_lengths(
    device: str, dtype: torch.dtype, float8: bool, seed: int, num_tokens: int
) -> None:
    check(Draw(seed, device), dtype, num_tokens, 2, 64, 16, float8)


@each_dtype
@pytest.mark.parametrize("layout", ["dense", "odd"])
@pytest.mark.parametrize("scale", [None, 1.0, 0.37])
def test_rounding_to_float8(
    device: str, dtype: torch.dtype, seed: int, layout: str, scale: float | None
) -> None:
    """Every float8 number, what lies between two of them, and what is too large for any; NaN stays
    NaN.
    """
    draw = Draw(seed, device)
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    finite = numbers[numbers.isfinite()].sort()[0]
    quarters = [finite[:-1] + finite.diff() * part for part in (0.25, 0.5, 0.500001, 0.75)]
    edges = torch.tensor([464, 464.01, 480, 1e4, 1e38, torch.inf, 1e-9, 2**-10, 2**-10 * 1.01])
    x = torch.cat((numbers, *quarters, edges, -edges)) * (scale or 1)
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 1, 64).to(device, dtype)
    scales = None if scale is None else torch.tensor([scale], device=device)
    slots = torch.arange(len(x), device=device)
    zeros = torch.zeros(len(x), 1, 1, 64, dtype=FLOAT8, device=device)
    caches = [draw.strided(zeros, 0.0, layout) for _ in range(2)]
    expected = [zeros.clone() for _ in range(2)]
    options = {"k_scale": scales, "v_scale": scales}
    ops.reshape_and_cache(draw.strided(x, layout=layout), x, *caches, slots, **options)
    reference.reshape_and_cache(x, x, *expected, slots, **options)
    for cache, other in zip(caches, expected, strict=True):
        finite_at = ~other.float().isnan()
        assert_equal_bits(cache[finite_at], other[finite_at])
        assert bool(cache[~finite_at].float().isnan().all())


@each_dtype
def test_keys_of_a_fused_projection(device: str, dtype: torch.dtype, seed: int) -> None:
    """Keys and values as slices of one row of query, key and value; NaN passes as it is."""
    draw = Draw(seed, device)
    qkv = draw.normal(11, (6 + 2 + 2) * 64, dtype=dtype)
    qkv[3] = torch.nan
    key, value = (part.unflatten(1, (2, 64)) for part in qkv.split([384, 128, 128], dim=1)[1:])
    caches = [torch.zeros(3, 8, 2, 64, dtype=dtype, device=device) for _ in range(4)]
    slot_mapping = torch.tensor(draw.sample(24, 11), device=device)
    ops.reshape_and_cache(key, value, *caches[:2], slot_mapping)
    reference.reshape_and_cache(key, value, *caches[2:], slot_mapping)
    assert_equal_bits(caches[0], caches[2])
    assert_equal_bits(caches[1], caches[3])
