"""Blocks copied to host memory and back keep their bytes."""

from __future__ import annotations

import random

import pytest
import torch

from nano_vllm.cache import host_cache
from nano_vllm.cache.host_cache import HostCache
from nano_vllm.cache.kv_cache import KVCache
from nano_vllm.config import ModelConfig
from nano_vllm.model_size import bytes_per_block

NUM_BLOCKS, NUM_HOST_BLOCKS, SIZE = 12, 7, 8
CONFIG = ModelConfig("LlamaForCausalLM", 10, 32, 32, 3, 4, 2, 16, 64, 1e-6, 1e4)
DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32]


def make_caches(
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch | None = None,
    blocks_at_once: int = 0,
) -> tuple[KVCache, HostCache]:
    """A pool of random bytes; copies are made of so many blocks at a time."""
    cache = KVCache(CONFIG, NUM_BLOCKS, SIZE, dtype, torch.device(device))
    pool = cache.pool.view(torch.uint8)
    pool.copy_(torch.randint(0, 256, pool.shape, dtype=torch.uint8))
    if monkeypatch is not None:
        block_bytes = bytes_per_block(CONFIG, SIZE, dtype.itemsize)
        # One byte too little for another block
        chunk = (blocks_at_once + 1) * block_bytes - 1
        monkeypatch.setattr(host_cache, "CHUNK_BYTES", chunk)
    return cache, HostCache(cache, NUM_HOST_BLOCKS)


def content(cache: KVCache) -> torch.Tensor:
    """Bytes by block."""
    return cache.pool.view(torch.uint8).movedim(2, 0).cpu().clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks_at_once", [0, 1, 2, 3, 100])
def test_there_and_back(
    dtype: torch.dtype, device: str, blocks_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaNs too, and whatever the length of the list is to what is copied at a time."""
    cache, host = make_caches(dtype, device, monkeypatch, blocks_at_once)
    before = content(cache)
    out = [(11, 3), (0, 0), (5, 6), (4, 1), (7, 2)]
    host.copy_out(out)
    assert torch.equal(content(cache), before)
    cache.pool.view(torch.uint8).zero_()
    back = [(6, 0), (1, 11), (3, 4), (0, 8), (2, 9)]
    host.copy_in(back)
    after = content(cache)
    source = {host_block: block for block, host_block in out}
    written = {block: before[source[host_block]] for host_block, block in back}
    for block in range(NUM_BLOCKS):
        expected = written.get(block, torch.zeros_like(before[0]))
        assert torch.equal(after[block], expected), block
    # The tier above is read through `layers` in the same places.
    keys, values = cache.layers[1]
    assert torch.equal(keys[11].transpose(0, 1).view(torch.uint8).cpu(), before[4][1, 0])
    assert torch.equal(values[11].transpose(0, 1).view(torch.uint8).cpu(), before[4][1, 1])


def test_nothing_to_copy(device: str) -> None:
    cache, host = make_caches(torch.float32, device)
    before = content(cache)
    host.copy_out([])
    host.copy_in([])
    assert torch.equal(content(cache), before)


@pytest.mark.parametrize("blocks_at_once", [1, 2, 3, 100])
def test_of_equal_host_blocks_the_last_one_counts(
    device: str, blocks_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, host = make_caches(torch.bfloat16, device, monkeypatch, blocks_at_once)
    before = content(cache)
    host.copy_out([(1, 4), (2, 5), (3, 4), (6, 5), (9, 4)])
    host.copy_in([(4, 0), (5, 1)])
    after = content(cache)
    assert torch.equal(after[0], before[9])
    assert torch.equal(after[1], before[6])
    assert torch.equal(after[2:], before[2:])


def test_one_host_block_into_several(device: str) -> None:
    cache, host = make_caches(torch.float16, device)
    before = content(cache)
    host.copy_out([(7, 2)])
    host.copy_in([(2, 0), (2, 1), (2, 11)])
    after = content(cache)
    for block in (0, 1, 11, 7):
        assert torch.equal(after[block], before[7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_made_in_the_order_of_the_calls(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    cache, host = make_caches(dtype, device, monkeypatch, blocks_at_once=2)
    blocks = list(content(cache))
    host_blocks: list[torch.Tensor | None] = [None] * NUM_HOST_BLOCKS
    draw = random.Random(seed)
    for _ in range(60):
        if draw.random() < 0.5:
            pairs = [
                (draw.randrange(NUM_BLOCKS), draw.randrange(NUM_HOST_BLOCKS))
                for _ in range(draw.randrange(6))
            ]
            host.copy_out(pairs)
            for block, host_block in pairs:
                host_blocks[host_block] = blocks[block]
        else:
            known = [place for place, held in enumerate(host_blocks) if held is not None]
            into = draw.sample(range(NUM_BLOCKS), draw.randrange(6))
            pairs = [(draw.choice(known), block) for block in into] if known else []
            host.copy_in(pairs)
            for host_block, block in pairs:
                held = host_blocks[host_block]
                assert held is not None
                blocks[block] = held
    assert torch.equal(content(cache), torch.stack(blocks))


def test_how_long_a_block_takes(device: str) -> None:
    _, host = make_caches(torch.float32, device)
    assert 0 < host.measure_copy_in() < 1
    assert host.num_blocks == NUM_HOST_BLOCKS
