"""`qkv_linear` against a float64 product behind which the reference rotates and writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import FLOAT8, SENTINEL, Draw, random_cases

MAX_POSITION = 300

each_16_bit_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


class Inputs:
    """Random tokens, some of them padding, a weight, and caches of sentinels."""

    def __init__(
        self,
        draw: Draw,
        dtype: torch.dtype,
        num_tokens: int,
        in_features: int,
        heads: tuple[int, int],
        head_dim: int,
    ) -> None:
        self.draw, self.heads, self.head_dim = draw, heads, head_dim
        block_size = draw.choice((8, 16, 32))
        num_blocks = -(-num_tokens // block_size) + draw.between(1, 3)
        slots = draw.sample(num_blocks * block_size, num_tokens)
        slots = [draw.choice((-1, -7, -(2**40))) if draw.between(1, 8) == 1 else s for s in slots]
        self.slot_mapping = torch.tensor(slots, dtype=torch.int64, device=draw.device)
        self.positions = draw.integers(0, MAX_POSITION - 1, num_tokens, dtype=torch.int64)
        self.cos_sin_cache = draw.normal(MAX_POSITION, head_dim, dtype=torch.float32)
        out_features = (heads[0] + 2 * heads[1]) * head_dim
        self.input = self.laid_out(draw.normal(num_tokens, in_features, dtype=dtype))
        self.weight = self.laid_out(
            draw.normal(out_features, in_features, dtype=dtype) * in_features**-0.5
        )
        self.bias = draw.choice((None, draw.normal(out_features, dtype=dtype)))
        self.options: dict[str, Any] = {"norm_eps": draw.choice((1e-6, 1e-2))}
        for name in ("query", "key"):
            if draw.choice((True, False)):
                self.options[f"{name}_norm_weight"] = draw.normal(head_dim, dtype=dtype)
        self.cache_shape = (num_blocks, block_size, heads[1], head_dim)

    def laid_out(self, tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
        """All that the kernel moves lies at multiples of 8 elements."""
        return self.draw.strided(tensor, fill, self.draw.choice(("dense", "aligned")))

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.draw.strided(tensor, layout="dense")

    def empty_query(self) -> torch.Tensor:
        shape = (len(self.input), self.heads[0], self.head_dim)
        return self.laid_out(torch.full(shape, torch.nan).to(self.input), SENTINEL)

    def empty_caches(self, dtype: torch.dtype) -> list[torch.Tensor]:
        sentinels = torch.full(self.cache_shape, SENTINEL, device="cuda").to(dtype)
        return [self.laid_out(sentinels, SENTINEL) for _ in range(2)]

    def run(
        self, query: torch.Tensor, caches: list[torch.Tensor], **scales: torch.Tensor | None
    ) -> None:
        torch.cuda.synchronize()  # weights are at rest
        ops.qkv_linear(
            query,
            self.input,
            self.weight,
            self.bias,
            self.positions,
            *caches,
            self.slot_mapping,
            self.cos_sin_cache,
            **self.options,
            **scales,
        )

    def expected(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """In float64, the caches over sentinels."""
        qkv = self.input.double() @ self.weight.double().T
        if self.bias is not None:
            qkv += self.bias.double()
        num_heads, num_kv_heads = self.heads
        query, key, value = qkv.view(len(qkv), -1, self.head_dim).split(
            (num_heads, num_kv_heads, num_kv_heads), dim=1
        )
        query = query.clone()
        caches = [torch.full(self.cache_shape, SENTINEL, device="cuda").double() for _ in range(2)]
        reference.rotary_reshape_and_cache(
            self.positions,
            query,
            key,
            value,
            *caches,
            self.slot_mapping,
            self.cos_sin_cache,
            **self.options,
        )
        return query, caches


def check(
    draw: Draw,
    dtype: torch.dtype,
    num_tokens: int,
    in_features: int,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    inputs = Inputs(draw, dtype, num_tokens, in_features, heads, head_dim)
    query, caches = inputs.empty_query(), inputs.empty_caches(dtype)
    inputs.run(query, caches)
    expected_query, expected_caches = inputs.expected()
    assert_close(query, expected_query)
    assert_gaps_untouched(query)
    written = (expected_caches[0] != SENTINEL).any(-1)
    for cache, expected in zip(caches, expected_caches, strict=True):
        assert_close(cache[written], expected[written])
        assert bool((cache[~written] == SENTINEL).all())
        assert_gaps_untouched(cache)

    # A float8 cache has what reshape_and_cache makes of the same keys and values.
    scales = {name: draw.choice((None, draw.scales(heads[1]))) for name in ("k_scale", "v_scale")}
    quantized, again = inputs.empty_caches(FLOAT8), inputs.empty_query()
    inputs.run(again, quantized, **scales)
    assert_equal_bits(again, query)
    blocks, rows = (
        inputs.slot_mapping.clamp_min(0) // inputs.cache_shape[1],
        inputs.slot_mapping.clamp_min(0) % inputs.cache_shape[1],
    )
    separately = inputs.empty_caches(FLOAT8)
    key, value = (cache[blocks, rows] for cache in caches)
    ops.reshape_and_cache(key, value, *separately, inputs.slot_mapping, **scales)
    for cache, expected in zip(quantized, separately, strict=True):
        assert_equal_bits(cache, expected)
        assert_gaps_untouched(cache)


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_tokens", [1, 33, 127, 128, 129, 256, 257, 1000, 4097])
def test_rows(dtype: torch.dtype, seed: int, head_dim: int, num_tokens: int) -> None:
    draw = Draw(seed, "cuda")
    for in_features, heads in ((1024, (16, 8)), (8, (1, 1)), (576, (9, 3)), (200, (7, 2))):
        check(draw, dtype, num_tokens, in_features, heads, head_dim)


@pytest.mark.cuda
@each_16_bit_dtype
@random_cases(40)
def test_random_shapes(dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, "cuda")
    num_kv_heads = draw.between(1, 9)
    heads = num_kv_heads * draw.between(1, 8), num_kv_heads
    num_tokens = draw.between(1, draw.choice((100, 700, 3000)))
    check(draw, dtype, num_tokens, 8 * draw.between(1, 300), heads, draw.choice((64, 128)))


@pytest.mark.cuda
@each_16_bit_dtype
def test_row_alone(dtype: torch.dtype, seed: int) -> None:
    """A row's bits do not depend on the others."""
    draw = Draw(seed, "cuda")
    inputs = Inputs(draw, dtype, 2000, 1024, (16, 8), 128)
    together = inputs.empty_query()
    inputs.run(together, inputs.empty_caches(dtype))
    for count in (1, 33, 128, 300, 1999):
        some = Inputs(draw, dtype, count, 1024, (16, 8), 128)
        for name in ("weight", "bias", "cos_sin_cache", "options"):
            setattr(some, name, getattr(inputs, name))
        some.input = inputs.rows(inputs.input[2000 - count :])
        some.positions = inputs.positions[2000 - count :]
        query = some.empty_query()
        some.run(query, some.empty_caches(dtype))
        assert_equal_bits(query, together[2000 - count :])


@pytest.mark.cuda
@each_16_bit_dtype
def test_large_heads_of_one_row(dtype: torch.dtype, seed: int) -> None:
    """Products beyond float16, which the norm brings back: nothing is rounded before it."""
    draw = Draw(seed, "cuda")
    inputs = Inputs(draw, dtype, 300, 1024, (4, 2), 128)
    inputs.bias = None
    inputs.input *= 100.0
    inputs.weight *= 100.0
    inputs.input[7] *= 100.0
    inputs.options = {
        f"{name}_norm_weight": draw.normal(128, dtype=dtype) for name in ("query", "key")
    }
    query, caches = inputs.empty_query(), inputs.empty_caches(dtype)
    inputs.run(query, caches)
    assert_close(query, inputs.expected()[0])


@pytest.mark.cuda
@each_16_bit_dtype
@pytest.mark.parametrize("num_tokens", [40, 300])
def test_chain(dtype: torch.dtype, seed: int, num_tokens: int) -> None:
    """Kernels that start before the one ahead has ended see all of its results, and leave alone
    what it still reads: as one by one.
    """

    def layers(pauses: bool) -> tuple[torch.Tensor, ...]:
        inputs = Inputs(Draw(seed, "cuda"), dtype, num_tokens, 1024, (8, 4), 128)
        caches, x = inputs.empty_caches(dtype), inputs.input
        hidden, weight = x.clone(), inputs.draw.normal(1024, dtype=dtype)
        for _ in range(20):
            query = inputs.empty_query() if pauses else torch.empty_like(x).view(-1, 8, 128)
            inputs.input = x
            torch.cuda.synchronize() if pauses else None
            ops.qkv_linear(
                query,
                x,
                inputs.weight,
                inputs.bias,
                inputs.positions,
                *caches,
                inputs.slot_mapping,
                inputs.cos_sin_cache,
                **inputs.options,
            )
            torch.cuda.synchronize() if pauses else None
            x = query.reshape(-1, 1024)
            ops.fused_add_rms_norm(x, x, hidden, weight, 1e-6)
        return hidden, *caches

    expected = layers(pauses=True)
    for _ in range(5):
        for tensor, values in zip(layers(pauses=False), expected, strict=True):
            assert_equal_bits(tensor.contiguous(), values.contiguous())


def test_where_it_pays(device: str) -> None:
    is_hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    for dtype, shape, head_dim, fits in (
        (torch.bfloat16, (4096, 1024), 128, True),
        (torch.float16, (4096, 1024), 64, True),
        (torch.bfloat16, (4096, 1024), 96, False),
        (torch.float32, (4096, 1024), 128, False),
        (torch.bfloat16, (4096, 1020), 128, False),
    ):
        weight = torch.empty(shape, dtype=dtype, device=device)
        assert ops.qkv_linear_pays(weight, 8192, head_dim) == (is_hopper and fits)
        for num_rows in (0, 1, 32):
            assert not ops.qkv_linear_pays(weight, num_rows, head_dim)


@pytest.mark.cuda
def test_refusals() -> None:
    def arguments() -> dict[str, Any]:
        draw = Draw(0, "cuda")
        inputs = Inputs(draw, torch.bfloat16, 40, 64, (4, 2), 64)
        names = ("input", "weight", "bias", "positions", "slot_mapping", "cos_sin_cache")
        caches = inputs.empty_caches(torch.bfloat16)
        given = {name: getattr(inputs, name) for name in names} | inputs.options
        return given | {
            "query": inputs.empty_query(),
            "key_cache": caches[0],
            "value_cache": caches[1],
        }

    def odd(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)

    def refuse(message: str, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ops.qkv_linear(**arguments() | given)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    ops.qkv_linear(**arguments())
    refuse("weight must have shape .512, 64., got .500, 64.", weight=empty(500, 64))
    refuse("bias must have shape .512., got .8.", bias=empty(8))
    refuse("query must have shape .40, any, 64., got .41, 4, 64.", query=empty(41, 4, 64))
    refuse("query must be bfloat16, got float32", query=empty(40, 4, 64, dtype=torch.float32))
    refuse("all of them rotated, got 64 and 32", cos_sin_cache=empty(9, 32, dtype=torch.float32))
    refuse("query must have heads that begin at multiples of 16 bytes", query=odd(empty(40, 4, 64)))
    refuse(
        "value_cache must have heads that begin at multiples of 16 bytes",
        value_cache=odd(arguments()["key_cache"].contiguous()),
    )
    refuse("query_norm_weight must begin at a multiple of 16", query_norm_weight=odd(empty(64)))
    refuse("cos_sin_cache must begin", cos_sin_cache=odd(empty(9, 64, dtype=torch.float32)))
    refuse("input must begin at a multiple of 16 bytes", input=odd(empty(40, 64)))
    with pytest.raises(ValueError, match="qkv_linear runs on CUDA alone, got a tensor on cpu"):
        ops.qkv_linear(**{n: torch.empty(0) if n == "input" else t for n, t in arguments().items()})
