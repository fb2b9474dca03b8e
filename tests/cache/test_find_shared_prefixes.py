"""find_shared_prefixes: what it finds is shared, and it finds what is easy to see."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nano_vllm._core import find_shared_prefixes

BLOCK_SIZE = 16


def find(
    tables: list[list[int]],
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    min_saved_tokens: int = 0,
) -> tuple[int, list[int], list[int]]:
    width = max(map(len, tables))
    padded = np.array([table + [0] * (width - len(table)) for table in tables], np.int32)
    starts = np.cumsum([0, *(query_lens or [1] * len(tables))]).astype(np.int32)
    out = np.full((2, len(tables)), -1, np.int32)
    saved = find_shared_prefixes(
        starts, np.array(seq_lens, np.int32), padded, BLOCK_SIZE, min_saved_tokens, out
    )
    return saved, out[0].tolist(), out[1].tolist()


def test_groups() -> None:
    tables = [[5, 6, 7], [9, 8, 1], [5, 6, 2], [9, 8, 3], [4, 5, 6]]
    saved, leaders, lens = find(tables, [48] * 5)
    assert (saved, leaders, lens) == (64, [0, 1, 0, 1, 4], [32, 32, 32, 32, 0])


def test_the_last_token_is_not_shared() -> None:
    assert find([[5, 6, 1], [5, 6, 2]], [33, 33])[2] == [32, 32]
    assert find([[5, 6], [5, 6]], [32, 32])[2] == [16, 16]
    assert find([[5], [5]], [16, 16]) == (0, [0, 1], [0, 0])


def test_only_single_queries() -> None:
    saved, leaders, lens = find([[5, 6]] * 4, [32, 32, 30, 32], [1, 2, 1, 0])
    assert (saved, leaders, lens) == (16, [0, 1, 0, 3], [16, 0, 16, 0])


def test_one_that_shares_little_takes_nothing_away() -> None:
    long = list(range(10, 30))
    tables = [[*long, 1], [*long, 2], [10, 11, 3]]
    _, leaders, lens = find(tables, [330, 330, 40])
    assert leaders[:2] == [0, 0]
    assert lens == [320, 320, 0]


def test_too_little_to_save() -> None:
    tables = [[5, 6, 7], [5, 6, 8]]
    assert find(tables, [40, 40], min_saved_tokens=33) == (0, [0, 1], [0, 0])
    assert find(tables, [40, 40], min_saved_tokens=32)[0] == 32


@pytest.mark.parametrize("seed", range(50))
def test_what_is_found_is_shared(seed: int) -> None:
    draw = random.Random(seed)
    trunks = [[draw.randrange(1000) for _ in range(draw.randrange(1, 12))] for _ in range(3)]
    tables, seq_lens = [], []
    for _ in range(draw.randrange(1, 40)):
        trunk = draw.choice(trunks)
        own = [draw.randrange(1000, 9000) for _ in range(draw.randrange(1, 4))]
        table = trunk[: draw.randrange(len(trunk) + 1)] + own
        tables.append(table)
        seq_lens.append(draw.randrange(1, BLOCK_SIZE * len(table) + 1))
    query_lens = [draw.choice((1, 1, 1, 0, 3)) for _ in tables]
    saved, leaders, lens = find(tables, seq_lens, query_lens)
    members = {leader: leaders.count(leader) for leader in leaders}
    assert saved == sum(lens[s] for s, leader in enumerate(leaders) if leader != s)
    for s, (leader, length) in enumerate(zip(leaders, lens, strict=True)):
        assert leaders[leader] == leader
        assert lens[leader] == length
        assert length % BLOCK_SIZE == 0
        assert length < seq_lens[s] or length == 0
        blocks = length // BLOCK_SIZE
        assert tables[s][:blocks] == tables[leader][:blocks]
        if length:
            assert query_lens[s] == 1
            assert members[leader] > 1
        else:
            assert leader == s


def test_a_table_too_short() -> None:
    with pytest.raises(ValueError, match="sequence 1 has more tokens than its block table holds"):
        find([[5, 6], [5]], [32, 33])
