"""`paged_attention` of decodes that begin with the same blocks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_batch import AttentionBatch, CachedSequence, HeadShape, page
from tests.kernels.attention_batch import draw_sequence as draw_any
from tests.kernels.draw import Draw, each_cache, each_dtype, random_cases

HEADS = ((1, 1), (4, 4), (8, 2), (8, 1), (9, 3), (14, 2), (32, 1))
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


def draw_groups(
    draw: Draw,
    num_seqs: int,
    longest_prefix: int,
    block_size: int,
    heads: HeadShape,
    dtype: torch.dtype,
) -> tuple[list[CachedSequence], list[int], list[int]]:
    """Sequences, their leaders and how much they share; groups in any order among loners, which
    may be prefills.
    """
    sequences: list[CachedSequence] = []
    leaders: list[int] = []
    lens: list[int] = []
    for s in range(num_seqs):
        groups = [i for i in range(s) if lens[i] and leaders[i] == i]
        leader, length = s, 0
        if groups and draw.between(0, 3):
            leader = draw.choice(groups)
            length = lens[leader]
        elif draw.between(0, 1):
            length = block_size * draw.between(1, max(longest_prefix // block_size, 1))
        seq_len = length + draw.between(1, 3 * block_size)
        query_len = 1 if length else min(seq_len, draw.choice((0, 1, 1, 5, 30)))
        sequence = draw_any(draw, query_len, seq_len, heads, dtype)
        if leader != s:
            sequence.keys[:length] = sequences[leader].keys[:length]
            sequence.values[:length] = sequences[leader].values[:length]
        sequences.append(sequence)
        leaders.append(leader)
        lens.append(length)
    return sequences, leaders, lens


def share(batch: AttentionBatch, leaders: list[int], lens: list[int], block_size: int) -> None:
    """Leads the tables of all members to the leader's blocks; their own copies become NaN."""
    for s, (leader, length) in enumerate(zip(leaders, lens, strict=True)):
        if leader == s:
            continue
        blocks = batch.block_tables[s, : length // block_size]
        for cache in (batch.key_cache, batch.value_cache):
            nan = torch.full_like(cache[0], torch.nan, dtype=torch.float32).to(cache.dtype)
            for block in blocks.tolist():
                cache[block] = nan
        blocks.copy_(batch.block_tables[leader, : length // block_size])
    batch.options["shared_prefix"] = torch.tensor(
        [leaders, lens], dtype=torch.int32, device=batch.draw.device
    )


@each_dtype
@each_cache
@random_cases(12)
def test_random_groups(device: str, dtype: torch.dtype, float8: bool, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    heads = HeadShape(*draw.choice(HEADS), draw.choice(HEAD_DIMS))
    block_size = draw.choice((8, 16, 32, 64, 256))
    num_seqs, longest = draw.choice(((4, 1500), (12, 600), (70, 200)))
    sequences, leaders, lens = draw_groups(draw, num_seqs, longest, block_size, heads, dtype)
    batch = page(
        draw,
        sequences,
        block_size,
        float8=float8,
        has_all_blocks=True,
        sliding_window=draw.choice((0, 0, 0, 50)),
        softcap=draw.choice((0.0, 0.0, 5.0)),
    )
    share(batch, leaders, lens, block_size)
    batch.check()


@each_dtype
@pytest.mark.parametrize(("num_seqs", "length"), [(130, 256), (2, 4096), (33, 2048)])
def test_one_group(device: str, dtype: torch.dtype, seed: int, num_seqs: int, length: int) -> None:
    """More rows than a tile has, and so few that the prefix is split."""
    draw = Draw(seed, device)
    heads = HeadShape(4, 1, 128)
    leader = draw_any(draw, 1, length + 20, heads, dtype)
    sequences = [leader]
    for _ in range(num_seqs - 1):
        member = draw_any(draw, 1, length + draw.choice((1, 40, 400)), heads, dtype)
        member.keys[:length], member.values[:length] = leader.keys[:length], leader.values[:length]
        sequences.append(member)
    batch = page(draw, sequences, 16)
    share(batch, [0] * num_seqs, [length] * num_seqs, 16)
    batch.check()
