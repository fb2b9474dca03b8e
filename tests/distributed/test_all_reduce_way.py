"""In which way ranks sum."""

from __future__ import annotations

import pytest

from nano_vllm.distributed.all_reduce_way import (
    HOP_SECONDS,
    MAX_BYTES,
    MAX_RANKS,
    RATE,
    Way,
    one_shot_limit,
    way_of,
)


def test_two_ranks_need_one_shot_only() -> None:
    for size in (0, 1 << 20, MAX_BYTES):
        assert way_of(size, 2) is Way.ONE_SHOT


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
    assert way_of(MAX_BYTES, ranks) is not Way.NCCL
    assert way_of(MAX_BYTES + 1, ranks) is Way.NCCL
    assert way_of(16, MAX_RANKS + 1) is Way.NCCL
