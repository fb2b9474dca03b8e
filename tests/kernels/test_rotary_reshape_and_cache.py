"""`rotary_reshape_and_cache` against its reference, and bit for bit against single ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import FLOAT8, SENTINEL, Draw, each_cache, each_dtype, random_cases

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_POSITION = 500

each_style = pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
each_norm = pytest.mark.parametrize("norms", ["", "query", "key", "query key"])


@dataclass
class Shape:
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int = 16


def cos_sin_cache(draw: Draw, rotary_dim: int) -> torch.Tensor:
    """Angles of a base of 10000, and not of length one: yarn scales cosines and sines."""
    inv_freq = 10000 ** -(torch.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    angles = torch.outer(torch.arange(MAX_POSITION), inv_freq)
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * draw.choice((1.0, 1.2))
    return cache.float().to(draw.device)


class Inputs:
    """Random tokens, some of them padding, for a cache of sentinels; query, key and value are
    slices of one tensor or lie apart, in layouts of their own.
    """

    def __init__(
        self,
        draw: Draw,
        dtype: torch.dtype,
        shape: Shape,
        is_neox: bool,
        norms: str,
        float8: bool = False,
    ) -> None:
        num_blocks = -(-shape.num_tokens // shape.block_size) + draw.between(1, 3)
        slots = draw.sample(num_blocks * shape.block_size, shape.num_tokens)
        slots = [draw.choice((-1, -7, -(2**40))) if draw.between(1, 8) == 1 else s for s in slots]
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        if draw.choice((True, False)):
            qkv = draw.normal(shape.num_tokens, sum(heads), shape.head_dim, dtype=dtype)
            self.storages = [draw.strided(qkv, SENTINEL)]
            self.query, self.key, self.value = self.storages[0].split(heads, dim=1)
        else:
            self.storages = [
                draw.strided(
                    draw.normal(shape.num_tokens, count, shape.head_dim, dtype=dtype), SENTINEL
                )
                for count in heads
            ]
            self.query, self.key, self.value = self.storages
        self.positions = draw.integers(0, MAX_POSITION - 1, shape.num_tokens, dtype=torch.int64)
        self.slot_mapping = torch.tensor(slots, dtype=torch.int64, device=draw.device)
        self.cos_sin_cache = cos_sin_cache(draw, shape.rotary_dim)
        self.options: dict[str, Any] = {"is_neox": is_neox, "norm_eps": draw.choice((1e-6, 1e-2))}
        for name in norms.split():
            weight = draw.strided(draw.normal(shape.head_dim, dtype=dtype))
            self.options[f"{name}_norm_weight"] = weight
        self.scales = {
            name: draw.scales(shape.num_kv_heads)
            for name in ("k_scale", "v_scale")
            if float8 and draw.choice((True, True, False))
        }
        sizes = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        cache_dtype = FLOAT8 if float8 else dtype
        self.untouched = torch.full(sizes, SENTINEL, dtype=cache_dtype, device=draw.device)
        if draw.choice((True, False)):
            heads_first = draw.strided(self.untouched.transpose(1, 2), SENTINEL, "dense")
            self.caches = [heads_first.clone().transpose(1, 2) for _ in range(2)]
        else:
            self.caches = [draw.strided(self.untouched, SENTINEL) for _ in range(2)]

    def write_with(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, caches: list[torch.Tensor]
    ) -> None:
        module.rotary_reshape_and_cache(
            self.positions,
            query,
            key,
            self.value,
            *caches,
            self.slot_mapping,
            self.cos_sin_cache,
            **self.options,
            **self.scales,
        )

    def run(self) -> None:
        self.write_with(ops, self.query, self.key, self.caches)

    def run_separately(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The query and the caches that come of `rms_norm`, a rotation of queries alone (the keys
        taken for some) and `reshape_and_cache`.
        """
        query, key = self.query.clone(), self.key.clone()
        caches = [self.untouched.clone() for _ in range(2)]
        for name, heads in (("query", query), ("key", key)):
            weight = self.options.get(f"{name}_norm_weight")
            if weight is not None:
                ops.rms_norm(heads, heads, weight, self.options["norm_eps"])
            ops.rotary_reshape_and_cache(
                self.positions,
                heads,
                self.key,
                self.value,
                *caches,
                torch.full_like(self.slot_mapping, -1),
                self.cos_sin_cache,
                is_neox=self.options["is_neox"],
            )
        ops.reshape_and_cache(key, self.value, *caches, self.slot_mapping, **self.scales)
        return query, caches


def check(
    draw: Draw, dtype: torch.dtype, shape: Shape, is_neox: bool, norms: str, float8: bool
) -> None:
    inputs = Inputs(draw, dtype, shape, is_neox, norms, float8)
    before = [tensor.clone() for tensor in (inputs.query, inputs.key, inputs.value)]
    expected = before[0].double()
    expected_caches = [inputs.untouched.double() for _ in range(2)]
    inputs.write_with(reference, expected, before[1].double(), expected_caches)
    query, caches = inputs.run_separately()
    inputs.run()

    assert_close(inputs.query, expected)
    if not float8:  # whose steps are wide: that the bits are those of two ops is enough
        assert_close(inputs.caches[0], expected_caches[0])
    assert_equal_bits(inputs.query, query)
    for cache, same in zip(inputs.caches, caches, strict=True):
        assert_equal_bits(cache, same)
        assert_gaps_untouched(cache)
    assert_equal_bits(inputs.key, before[1])
    assert_equal_bits(inputs.value, before[2])
    if "query" not in norms:
        unturned = slice(shape.rotary_dim, None)
        assert_equal_bits(inputs.query[..., unturned], before[0][..., unturned])
    for storage in inputs.storages:
        assert_gaps_untouched(storage)


@each_dtype
@each_cache
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@each_style
@each_norm
def test_head_dims(
    device: str,
    dtype: torch.dtype,
    float8: bool,
    seed: int,
    head_dim: int,
    is_neox: bool,
    norms: str,
) -> None:
    check(Draw(seed, device), dtype, Shape(9, 6, 2, head_dim, head_dim), is_neox, norms, float8)


@each_dtype
@each_cache
@random_cases(8)
@each_style
def test_random_shapes(
    device: str, dtype: torch.dtype, float8: bool, seed: int, is_neox: bool, case: int
) -> None:
    """A part of the head rotated, or nothing; any number of heads and tokens."""
    draw = Draw(seed, device)
    head_dim = draw.choice((*HEAD_DIMS, 1, 6, 7, 20, 36, 100))
    rotary_dim = draw.choice((head_dim // 2 * 2, 2 * draw.between(0, head_dim // 2), 16))
    heads = draw.choice(((1, 1), (9, 3), (32, 1), (7, 7), (40, 8)))
    num_tokens = draw.choice((1, 2, 17, 130))
    block_size = draw.choice((1, 8, 24, 256))
    shape = Shape(num_tokens, *heads, head_dim, min(rotary_dim, head_dim // 2 * 2), block_size)
    check(draw, dtype, shape, is_neox, draw.choice(("", "query", "key", "query key")), float8)


@each_dtype
@each_norm
def test_broken_neighbours(device: str, dtype: torch.dtype, seed: int, norms: str) -> None:
    """NaN and infinity in a head stay there, and so does what a padding token holds."""
    draw = Draw(seed, device)
    inputs = Inputs(draw, dtype, Shape(11, 6, 2, 64, 32), True, norms)
    inputs.query[3, 4] = torch.nan
    inputs.key[5, 1] = torch.inf
    inputs.value[7, 0] = torch.nan
    inputs.slot_mapping[9] = -1
    inputs.key[9] = torch.nan
    inputs.value[9] = torch.nan
    query, caches = inputs.run_separately()
    inputs.run()
    assert bool(query[3, 4].isnan().any())
    assert bool(torch.cat((query[:3], query[4:])).isfinite().all())
    assert_equal_bits(inputs.query, query)
    for cache, same in zip(inputs.caches, caches, strict=True):
        assert_equal_bits(cache, same)


@each_dtype
@each_norm
def test_a_token_alone(device: str, dtype: torch.dtype, seed: int, norms: str) -> None:
    """The bits of a token depend neither on the others nor on where it lies in memory."""
    draw = Draw(seed, device)
    inputs = Inputs(draw, dtype, Shape(40, 6, 2, 128, 128), draw.choice((True, False)), norms)
    inputs.slot_mapping = torch.arange(40, device=device)
    queries = inputs.query.clone()
    inputs.run()
    for token in (0, 17, 39):
        caches = [torch.zeros_like(inputs.untouched[:1]) for _ in range(2)]
        query = draw.strided(queries[token : token + 1], SENTINEL, "odd")
        ops.rotary_reshape_and_cache(
            inputs.positions[token : token + 1],
            query,
            draw.strided(inputs.key[token : token + 1], SENTINEL, "odd"),
            inputs.value[token : token + 1],
            *caches,
            torch.zeros_like(inputs.slot_mapping[:1]),
            inputs.cos_sin_cache,
            **inputs.options,
        )
        assert_equal_bits(query[0], inputs.query[token])
        for cache, alone in zip(inputs.caches, caches, strict=True):
            assert_equal_bits(alone[0, 0], cache.flatten(0, 1)[token])


@each_dtype
def test_no_tokens(device: str, dtype: torch.dtype, seed: int) -> None:
    inputs = Inputs(Draw(seed, device), dtype, Shape(0, 2, 1, 64, 64), True, "query key")
    inputs.run()
    assert_equal_bits(inputs.caches[0], inputs.untouched)


@each_style
def test_reference_is_complex_multiplication(seed: int, is_neox: bool) -> None:
    draw = Draw(seed, "cpu")
    inputs = Inputs(draw, torch.float64, Shape(5, 2, 1, 8, 8), is_neox, "")
    query = inputs.query.clone()
    pairs = (
        query.unflatten(-1, (2, 4)).transpose(-1, -2) if is_neox else query.unflatten(-1, (4, 2))
    )
    turn = torch.complex(*inputs.cos_sin_cache[inputs.positions].double()[:, None].chunk(2, dim=-1))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    expected = (turned.transpose(-1, -2) if is_neox else turned).flatten(-2)
    inputs.write_with(reference, query, inputs.key, inputs.caches)
    torch.testing.assert_close(query, expected)
