"""In which way ranks sum, and in how many calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nano_vllm import ops
from nano_vllm.distributed.all_reduce_way import (
    HOP_SECONDS,
    MAX_BYTES,
    MAX_RANKS,
    MAX_SLICED_BYTES,
    PLAIN_BYTES,
    RATE,
    SLICE_BYTES,
    Way,
    largest_call,
    largest_message,
    one_shot_limit,
    slices_of,
    way_of,
)
from nano_vllm.distributed.peer_memory import PeerMemory


def test_two_ranks_need_one_shot_with_flags_and_without() -> None:
    for size in (0, PLAIN_BYTES - 16):
        assert way_of(size, 2) is Way.ONE_SHOT
    for size in (PLAIN_BYTES, SLICE_BYTES, SLICE_BYTES + 16, MAX_SLICED_BYTES):
        assert way_of(size, 2) is Way.PLAIN


@pytest.mark.parametrize("ranks", range(3, MAX_RANKS + 1))
def test_plain_is_for_two(ranks: int) -> None:
    for size in (16, PLAIN_BYTES, MAX_BYTES, MAX_SLICED_BYTES):
        assert way_of(size, ranks) is not Way.PLAIN


@pytest.mark.parametrize("ranks", range(3, MAX_RANKS + 1))
def test_the_limit_is_where_both_ways_take_as_long(ranks: int) -> None:
    limit = one_shot_limit(ranks)
    one_shot = (ranks - 1) * limit / RATE
    two_shot = HOP_SECONDS + 2 * (ranks - 1) / ranks * limit / RATE
    assert one_shot == pytest.approx(two_shot)
    assert way_of(limit - 16, ranks) is Way.ONE_SHOT
    assert way_of(limit + 16, ranks) is Way.TWO_SHOT


def test_more_ranks_take_two_shots_earlier() -> None:
    limits = [one_shot_limit(ranks) for ranks in range(2, MAX_RANKS + 1)]
    assert limits == sorted(limits, reverse=True)
    assert [round(one_shot_limit(ranks) / 1000) for ranks in (3, 4, 8)] == [216, 96, 27]


def test_one_shot_fits_the_buffers() -> None:
    """A message in one shot has room for 2 / ranks of the largest."""
    for ranks in range(3, MAX_RANKS + 1):
        assert one_shot_limit(ranks) <= 2 / ranks * MAX_BYTES


@pytest.mark.parametrize("ranks", range(2, MAX_RANKS + 1))
def test_large_messages_are_left_to_nccl(ranks: int) -> None:
    largest = largest_message(ranks)
    assert largest == (MAX_SLICED_BYTES if ranks == 2 else MAX_BYTES)
    assert way_of(largest, ranks) is not Way.NCCL
    assert way_of(largest + 1, ranks) is Way.NCCL
    assert way_of(16, MAX_RANKS + 1) is Way.NCCL


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8, 9, 1000])
def test_slices_are_even_and_fit(rows: int) -> None:
    slices = slices_of(rows, 48, 4 * 48 + 16)
    counts = [each.stop - each.start for each in slices]
    assert len(slices) == -(-rows // 4)
    assert [i for each in slices for i in range(each.start, each.stop)] == list(range(rows))
    assert max(counts, default=0) - min(counts, default=0) <= 1
    assert max(counts, default=0) <= 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_call_fits_the_buffers(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """The largest message is summed whole, each slice with its rows of the residual."""
    calls: list[Any] = []
    monkeypatch.setattr(ops, "all_reduce", lambda *args: calls.append(args))
    size, largest = 4096, largest_message(ranks)
    x = torch.zeros(largest // (2 * size), size, dtype=torch.bfloat16)
    residual, weight = torch.zeros_like(x), torch.ones_like(x[0])
    peers = PeerMemory(torch.zeros(ranks).long(), 0, x.device, largest_call(ranks))
    assert peers.takes(x)
    assert not peers.takes(torch.cat([x, x[:1]]))
    peers.all_reduce(x)
    peers.all_reduce_and_norm(x, residual, weight, 1e-5)
    assert len(calls) == 2 * largest // largest_call(ranks)
    at = 0
    for out, source, buffers, rank, max_bytes, way, *norm in calls:
        assert (buffers, rank, max_bytes) == (peers.buffers, 0, largest_call(ranks))
        assert way == way_of(largest, ranks).value
        assert out.data_ptr() == source.data_ptr() == x.data_ptr() + at % largest
        assert out.nbytes <= max_bytes
        if norm:
            assert norm[0].data_ptr() == residual.data_ptr() + at % largest
            assert norm[0].shape == out.shape
            assert norm[1:] == [weight, 1e-5]
        at += out.nbytes
    assert at == 2 * largest
