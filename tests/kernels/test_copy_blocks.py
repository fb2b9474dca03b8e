"""`copy_blocks` and `swap_blocks` against their references, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import DTYPES, FLOAT8, Draw, each_dtype, random_cases


def draw_pool(
    draw: Draw, dtype: torch.dtype, num_blocks: int, block: tuple[int, ...]
) -> torch.Tensor:
    """[num_layers, 2, num_blocks, *block] of random bits."""
    pool = draw.normal(draw.between(1, 5), 2, num_blocks, *block, dtype=dtype)
    pool[:, :, draw.between(0, num_blocks - 1)] = torch.nan
    return pool


def amid_others(draw: Draw, pool: torch.Tensor) -> torch.Tensor:
    """The same pool as a view that begins anywhere, with gaps between its blocks, the planes one
    after the other or interleaved.
    """
    blocks = draw.strided(pool.flatten(3).flatten(0, 1))
    return blocks.unflatten(2, pool.shape[3:]).unflatten(0, pool.shape[:2])


def draw_block(draw: Draw) -> tuple[int, ...]:
    """The dimensions of one block, a multiple of 16 bytes."""
    return draw.choice(((8, 1, 64), (16, 2, 80), (8, 3, 96), (256, 1, 64), (3, 5, 16), (16,)))


def pairs(draw: Draw, sources: list[int], destinations: list[int]) -> torch.Tensor:
    """Each destination gets a random source."""
    rows = [[draw.choice(sources), destination] for destination in destinations]
    return torch.tensor(rows, dtype=torch.int64, device=draw.device).view(-1, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8], ids=lambda dtype: str(dtype)[6:])
@random_cases(8)
def test_copy_blocks(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    num_blocks = draw.between(2, 30)
    pool = amid_others(draw, draw_pool(draw, dtype, num_blocks, draw_block(draw)))
    if pool.dim() == 6 and draw.choice((True, False)):
        pool = pool.transpose(3, 4)  # as the engine lays it out: dense, but not in this order
    expected = pool.clone()
    blocks = draw.sample(num_blocks, num_blocks)
    cut = draw.between(1, num_blocks - 1)
    mapping = pairs(draw, blocks[:cut], blocks[cut:])
    ops.copy_blocks(pool, mapping)
    reference.copy_blocks(expected, mapping)
    assert_equal_bits(pool, expected)
    assert_gaps_untouched(pool, torch.nan)


@pytest.mark.parametrize("num_pairs", [0, 1])
def test_few_pairs(device: str, seed: int, num_pairs: int) -> None:
    draw = Draw(seed, device)
    pool = draw_pool(draw, torch.float16, 4, (8, 2, 64))
    expected = pool.clone()
    mapping = pairs(draw, [2], [0][:num_pairs])
    ops.copy_blocks(pool, mapping)
    reference.copy_blocks(expected, mapping)
    assert_equal_bits(pool, expected)


def test_copy_within_a_part_of_a_pool(device: str, seed: int) -> None:
    """A pool may be some of the blocks of a larger one."""
    draw = Draw(seed, device)
    whole = draw_pool(draw, torch.bfloat16, 9, (8, 2, 64))
    expected = whole.clone()
    mapping = pairs(draw, [0, 1], [2, 4, 3])
    ops.copy_blocks(whole[:, :, 2:7], mapping)
    reference.copy_blocks(expected[:, :, 2:7], mapping)
    assert_equal_bits(whole, expected)


def check_swap(draw: Draw, src: torch.Tensor, dst: torch.Tensor) -> None:
    before = src.clone()
    expected = dst.clone()
    destinations = draw.sample(dst.shape[2], draw.between(1, dst.shape[2]))
    mapping = pairs(draw, list(range(src.shape[2])), destinations)
    ops.swap_blocks(src, dst, mapping)
    if draw.device == "cuda":
        torch.cuda.synchronize()
    reference.swap_blocks(before, expected, mapping)
    assert_equal_bits(dst, expected)
    assert_equal_bits(src, before)


@each_dtype
@random_cases(4)
def test_swap_on_one_device(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    block = draw_block(draw)
    src = amid_others(draw, draw_pool(draw, dtype, draw.between(1, 12), block))
    dst = amid_others(draw, draw.normal(len(src), 2, draw.between(1, 12), *block, dtype=dtype))
    check_swap(draw, src, dst)


@pytest.mark.cuda
@each_dtype
@random_cases(4)
def test_swap_with_pinned_memory(dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, "cuda")
    block = draw_block(draw)
    on_gpu = draw_pool(draw, dtype, draw.between(1, 12), block)
    on_host = draw.normal(len(on_gpu), 2, draw.between(1, 12), *block, dtype=dtype)
    on_host = on_host.cpu().pin_memory()
    check_swap(draw, on_gpu, on_host)
    check_swap(draw, on_host, on_gpu)


@pytest.mark.cuda
def test_swap_refuses_pageable_memory(seed: int) -> None:
    draw = Draw(seed, "cuda")
    on_gpu = draw_pool(draw, torch.float16, 3, (8, 1, 64))
    on_host = torch.empty_like(on_gpu, device="cpu")
    mapping = pairs(draw, [0], [1])
    with pytest.raises(ValueError, match="dst_cache must be in pinned memory"):
        ops.swap_blocks(on_gpu, on_host, mapping)
    with pytest.raises(ValueError, match="src_cache must be in pinned memory"):
        ops.swap_blocks(on_host, on_gpu, mapping)
