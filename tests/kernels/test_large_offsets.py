"""Offsets past 2^31 elements: in paged kernels, 32-bit index arithmetic reads other users' data.

On a CPU the memory is only reserved: a few of its pages are ever touched.
"""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits
from tests.kernels.draw import Draw

FAR = 2**31
DTYPE = torch.bfloat16
NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 2, 16, 64
BLOCK_NUMEL = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM


def reserve(device: str, numel: int) -> torch.Tensor:
    if device == "cuda" and torch.cuda.mem_get_info()[1] < 32 * 2**30:
        pytest.skip("needs a GPU of 32 GiB")
    return torch.empty(numel, dtype=DTYPE, device=device)


def far_pool(device: str) -> torch.Tensor:
    """[1, 2, num_blocks, block_size, num_kv_heads, head_dim]; each block's keys lie beside its
    values, and the last 8 blocks beyond 2^31 elements.
    """
    num_blocks = FAR // (2 * BLOCK_NUMEL) + 8
    pool = reserve(device, num_blocks * 2 * BLOCK_NUMEL)
    shape = (num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    return pool.view(shape).transpose(0, 1)[None]


def far_rows(draw: Draw, values: torch.Tensor) -> torch.Tensor:
    """The same values, each row of the first dimension 2^30 elements from the one before."""
    assert len(values) == 3
    spread = reserve(draw.device, FAR + values[0].numel())
    inner = values[0].contiguous().stride()
    return spread.as_strided(values.shape, (FAR // 2, *inner)).copy_(values)


def test_paged_attention(device: str, seed: int) -> None:
    draw = Draw(seed, device)
    pool = far_pool(device)
    key_cache, value_cache = pool[0]
    num_blocks = len(key_cache)
    blocks = [num_blocks - 1, 3, num_blocks - 8, num_blocks - 5]
    for cache in (key_cache, value_cache):
        cache[blocks] = draw.normal(4, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE)
    near = key_cache[blocks].clone(), value_cache[blocks].clone()
    for query_len in (1, 30):
        query = draw.normal(query_len, 4, HEAD_DIM, dtype=DTYPE)
        integers = [
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in ([blocks], [0, query_len], [60])
        ]
        options = {"max_query_len": query_len, "max_seq_len": 60, "scale": HEAD_DIM**-0.5}
        workspace = torch.empty(ops.paged_attention_workspace_numel(1, 4, HEAD_DIM), device=device)
        out = torch.full_like(query, torch.nan)
        ops.paged_attention(
            out, query, key_cache, value_cache, *integers, **options, workspace=workspace
        )
        expected = torch.empty_like(query, dtype=torch.float64)
        integers[0] = torch.arange(4, dtype=torch.int32, device=device)[None]
        reference.paged_attention(expected, query, *near, *integers, **options)
        assert_close(out, expected)


def test_reshape_and_cache(device: str, seed: int) -> None:
    draw = Draw(seed, device)
    key_cache, value_cache = far_pool(device)[0]
    first = (len(key_cache) - 8) * BLOCK_SIZE
    slots = [first + slot for slot in draw.sample(8 * BLOCK_SIZE, 20)] + [5]
    slot_mapping = torch.tensor(slots, device=device)
    key, value = (draw.normal(21, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    ops.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
    for cache, tokens in ((key_cache, key), (value_cache, value)):
        rows = cache[slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE]
        assert_equal_bits(rows, tokens)


def test_rotary_reshape_and_cache(device: str, seed: int) -> None:
    """Slots and rows far away, of the query and of its neighbours."""
    draw = Draw(seed, device)
    key_cache, value_cache = far_pool(device)[0]
    slots = [(len(key_cache) - 8) * BLOCK_SIZE + 5, 3, len(key_cache) * BLOCK_SIZE - 1]
    slot_mapping = torch.tensor(slots, device=device)
    query = draw.normal(3, 4, HEAD_DIM, dtype=DTYPE)
    key, value = (draw.normal(3, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    cos_sin_cache = draw.normal(10, HEAD_DIM, dtype=torch.float32)
    positions = torch.tensor([9, 0, 4], device=device)
    far = [far_rows(draw, tokens) for tokens in (query, key, value)]
    ops.rotary_reshape_and_cache(
        positions, *far, key_cache, value_cache, slot_mapping, cos_sin_cache
    )
    near = [torch.zeros(1, 3, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, device=device) for _ in range(2)]
    ops.rotary_reshape_and_cache(
        positions, query, key, value, *near, torch.arange(3, device=device), cos_sin_cache
    )
    assert_equal_bits(far[0], query)
    for cache, expected in zip((key_cache, value_cache), near, strict=True):
        rows = cache[slot_mapping // BLOCK_SIZE, slot_mapping % BLOCK_SIZE]
        assert_equal_bits(rows, expected[0])


def test_slots_beyond_31_bits(device: str, seed: int) -> None:
    """Blocks that overlap in memory give slot numbers larger than the memory has elements."""
    draw = Draw(seed, device)
    num_blocks = 2**28
    step = FAR // num_blocks
    storage = reserve(device, FAR + BLOCK_NUMEL)
    cache = storage.as_strided(
        (num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM),
        (step, NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, 1),
    )
    slot = (num_blocks - 1) * BLOCK_SIZE + 7
    assert slot > FAR
    key, value = (draw.normal(1, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    small = torch.empty(1, 1, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, device=device)
    values = small.expand(num_blocks, BLOCK_SIZE, -1, -1)
    ops.reshape_and_cache(key, value, cache, values, torch.tensor([slot], device=device))
    assert_equal_bits(cache[-1, 7], key[0])
    assert_equal_bits(small[0, 0], value[0])


@pytest.mark.parametrize("op", ["copy_blocks", "swap_blocks"])
def test_copies(device: str, seed: int, op: str) -> None:
    draw = Draw(seed, device)
    pool = far_pool(device)
    num_blocks = pool.shape[2]
    last = num_blocks - 1
    for block in (2, last):
        pool[0, :, block] = draw.normal(2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE)
    mapping = torch.tensor([[2, last - 3], [last, 4], [last, last - 7]], device=device)
    if op == "copy_blocks":
        ops.copy_blocks(pool, mapping)
    else:
        ops.swap_blocks(pool, pool, mapping)
    for src, dst in mapping.tolist():
        assert_equal_bits(pool[:, :, dst], pool[:, :, src])


def test_rows_of_attention(device: str, seed: int) -> None:
    """Query and output rows far apart."""
    draw = Draw(seed, device)
    query = draw.normal(3, 4, HEAD_DIM, dtype=DTYPE)
    key_cache, value_cache = (
        draw.normal(4, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2)
    )
    workspace = torch.empty(ops.paged_attention_workspace_numel(3, 4, HEAD_DIM), device=device)
    for query_lens, seq_lens in (((1, 1, 1), (30, 16, 5)), ((3,), (40,))):
        starts = [sum(query_lens[:s]) for s in range(len(query_lens) + 1)]
        tables = [[3, 1, 0], [2, 2, 2], [1, 0, 3]][: len(query_lens)]
        integers = [
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in (tables, starts, seq_lens)
        ]
        options = {"max_query_len": max(query_lens), "max_seq_len": 48, "scale": 0.1}
        out = far_rows(draw, torch.full_like(query, torch.nan))
        ops.paged_attention(
            out,
            far_rows(draw, query),
            key_cache,
            value_cache,
            *integers,
            **options,
            workspace=workspace,
        )
        expected = torch.empty_like(query, dtype=torch.float64)
        reference.paged_attention(expected, query, key_cache, value_cache, *integers, **options)
        assert_close(out, expected)


def test_rows_of_new_keys(device: str, seed: int) -> None:
    draw = Draw(seed, device)
    key, value = (draw.normal(3, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    caches = [
        torch.zeros(2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=DTYPE, device=device)
        for _ in range(2)
    ]
    slot_mapping = torch.tensor([20, 3, 9], device=device)
    ops.reshape_and_cache(far_rows(draw, key), far_rows(draw, value), *caches, slot_mapping)
    for cache, tokens in zip(caches, (key, value), strict=True):
        assert_equal_bits(cache.flatten(0, 1)[slot_mapping], tokens)


def test_rows_of_layers(device: str, seed: int) -> None:
    """Norms and activations."""
    draw = Draw(seed, device)
    input, residual = draw.normal(3, 128, dtype=DTYPE), draw.normal(3, 128, dtype=DTYPE)
    weight = draw.normal(128, dtype=DTYPE)
    out = far_rows(draw, torch.full_like(input, torch.nan))
    expected = torch.empty(3, 128, dtype=torch.float64, device=device)

    ops.rms_norm(out, far_rows(draw, input), weight, 1e-6)
    reference.rms_norm(expected, input, weight, 1e-6)
    assert_close(out, expected)

    far_residual = far_rows(draw, residual)
    ops.fused_add_rms_norm(out, far_rows(draw, input), far_residual, weight, 1e-6)
    reference.fused_add_rms_norm(expected, input, residual, weight, 1e-6)
    assert_close(out, expected)
    assert_equal_bits(far_residual, residual)

    for op in ("silu_and_mul", "gelu_and_mul"):
        getattr(ops, op)(out[:, :64], far_rows(draw, input))
        getattr(reference, op)(expected[:, :64], input)
        assert_close(out[:, :64], expected[:, :64])


def test_rows_of_linear(seed: int) -> None:
    draw = Draw(seed, "cpu")
    input, weight = draw.normal(3, 64, dtype=DTYPE), draw.normal(3, 64, dtype=DTYPE)
    out = far_rows(draw, torch.full((3, 3), torch.nan, dtype=DTYPE))
    ops.linear(out, far_rows(draw, input), far_rows(draw, weight))
    expected = torch.empty(3, 3, dtype=torch.float64)
    reference.linear(expected, input, weight)
    assert_close(out, expected)
