from __future__ import annotations

import pytest

from nano_vllm.batch import Batch
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence

SIZE = 8


def make_sequence(token_ids: list[int]) -> Sequence:
    return Sequence(0, "r", 0, token_ids, SamplingParams())


def start(manager: BlockManager, token_ids: list[int], sibling: Sequence | None = None) -> Sequence:
    """Admit a sequence."""
    sequence = make_sequence(token_ids)
    manager.share_prefix(sequence, sibling)
    manager.allocate(sequence, Batch([]))
    return sequence


def compute(manager: BlockManager, sequence: Sequence, num_tokens: int | None = None) -> None:
    sequence.num_computed_tokens = sequence.num_tokens if num_tokens is None else num_tokens
    manager.commit(sequence, sequence.num_computed_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"),
    [(1, 0), (7, 0), (8, 0), (9, 8), (15, 8), (16, 8), (17, 16), (24, 16), (25, 24)],
)
def test_hits_are_full_blocks_and_never_the_whole_prompt(num_tokens: int, num_cached: int) -> None:
    manager = BlockManager(16, SIZE)
    compute(manager, start(manager, list(range(40))))
    sequence = start(manager, list(range(num_tokens)))
    assert sequence.num_computed_tokens == num_cached
    assert len(sequence.block_table) == -(-num_tokens // SIZE)
    manager.allocator.check_integrity()


def test_freed_blocks_are_found_until_they_are_given_away() -> None:
    manager = BlockManager(4, SIZE)
    first = start(manager, list(range(24)))
    compute(manager, first)
    blocks = first.block_table
    manager.free(first)
    assert (first.block_table, first.block_hashes, first.num_computed_tokens) == ([], [], 0)
    assert manager.num_free_blocks == 4
    again = start(manager, list(range(24)))
    assert again.block_table[:2] == blocks[:2]
    manager.free(again)
    manager.free(start(manager, [99] * 32))
    assert start(manager, list(range(24))).num_computed_tokens == 0


def test_blocks_are_committed_once_they_are_computed() -> None:
    manager = BlockManager(16, SIZE)
    sequence = start(manager, list(range(30)))
    compute(manager, sequence, 15)
    assert len(sequence.block_hashes) == 1
    assert start(manager, list(range(30))).num_computed_tokens == 8
    compute(manager, sequence, 30)
    assert len(sequence.block_hashes) == 3
    assert start(manager, list(range(30))).num_computed_tokens == 24


def test_generated_blocks_are_found_too() -> None:
    manager = BlockManager(16, SIZE)
    sequence = start(manager, list(range(7)))
    compute(manager, sequence)
    sequence.token_ids.append(7)
    compute(manager, sequence)
    assert start(manager, list(range(12))).num_computed_tokens == 8


def test_equal_tokens_behind_others_are_not_found() -> None:
    manager = BlockManager(32, SIZE)
    a, b = [1] * SIZE, [2] * SIZE
    compute(manager, start(manager, a + b + b))
    assert start(manager, b + b + [0]).num_computed_tokens == 0
    assert start(manager, a + b + b + [0]).num_computed_tokens == 24
    assert start(manager, a + b + a + [0]).num_computed_tokens == 16


def test_nothing_is_found_without_prefix_caching() -> None:
    manager = BlockManager(16, SIZE, enable_prefix_caching=False)
    compute(manager, start(manager, list(range(20))))
    assert start(manager, list(range(20))).num_computed_tokens == 0
    assert manager.allocator.num_cached == 0


def test_missing_blocks_are_those_that_allocate_takes() -> None:
    manager = BlockManager(16, SIZE)
    first = start(manager, list(range(20)))
    compute(manager, first)
    sequence = make_sequence(list(range(32)))
    assert manager.num_missing_blocks([sequence]) == 4
    manager.share_prefix(sequence)
    assert manager.num_missing_blocks([sequence]) == 2
    manager.free(sequence)
    # Three that write into one block of which first is the fourth holder, and then the third.
    forks = [make_sequence(list(range(21))) for _ in range(3)]
    for fork in forks:
        manager.fork(first, fork, 20)
    assert manager.num_missing_blocks(forks) == 3
    first.token_ids.append(20)
    together = [first, *forks]
    assert manager.num_missing_blocks(together) == 3
    free, batch = manager.num_free_blocks, Batch([])
    for fork in together:
        manager.allocate(fork, batch)
    assert free - manager.num_free_blocks == len(batch.block_copies) == 3
    assert len({fork.block_table[-1] for fork in together}) == 4
    manager.allocator.check_integrity()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 20])
def test_a_fork_shares_all_but_the_block_it_writes(num_tokens: int, caching: bool) -> None:
    manager = BlockManager(16, SIZE, caching)
    first = start(manager, list(range(num_tokens)))
    compute(manager, first)
    fork = make_sequence(list(range(num_tokens)))
    manager.share_prefix(fork, first)
    assert fork.num_computed_tokens == num_tokens - 1
    batch = Batch([])
    manager.allocate(fork, batch)
    last = (num_tokens - 1) // SIZE
    assert fork.block_table[:last] == first.block_table[:last]
    if (num_tokens - 1) % SIZE:
        assert batch.block_copies == [(first.block_table[last], fork.block_table[last])]
    assert fork.block_table[last] != first.block_table[last]
    assert len(fork.block_table) == len(first.block_table)
    compute(manager, fork)
    manager.free(first)
    manager.free(fork)
    manager.allocator.check_integrity()
    assert manager.num_free_blocks == 16


def test_discarded_blocks_are_not_found_but_shared_ones_stay() -> None:
    manager = BlockManager(16, SIZE)
    first = start(manager, list(range(17)))
    compute(manager, first)
    second = start(manager, [*range(16), 99, *range(16)])
    compute(manager, second)
    manager.distrust(second)
    manager.free(second)
    assert start(manager, [*range(16), 99, *range(16)]).num_computed_tokens == 16
    manager.allocator.check_integrity()
