"""Which steps become CUDA graphs, by the sizes that they are padded to; without torch."""

from __future__ import annotations

from typing import NamedTuple

from nano_vllm.runner.limits import DECODE_QUERIES, MAX_GRAPH_TOKENS

PREPARED_SEQS = 256
"""Steps of up to so many sequences have their graphs captured ahead of need."""


class StepShape(NamedTuple):
    """What the kernels of a padded step go by."""

    is_decode: bool
    """Of decodes alone: their logits are part of it."""
    max_query_len: int
    """1, DECODE_QUERIES, or num_tokens where there is to be a kernel for prompts."""
    num_tokens: int
    num_seqs: int
    """With padding, both."""
    is_shared: bool
    """Whether a prefix is read once for all who share it: a kernel more."""


def decode_sizes(largest: int) -> list[int]:
    """Sequences of a step of decodes: 1, 2, 4, then multiples of 8 up to 256 and of 16 beyond."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, largest + 1, 16)]
    return [size for size in sizes if size < largest] + [largest]


def token_sizes(largest: int) -> list[int]:
    """Tokens of a step with prompts: multiples of 32 up to 256, of 64 up to 384, of 128 beyond.

    Not 448: cuBLAS takes a third longer for an 8B's products of 448 rows than for those of 512.
    """
    sizes = [*range(32, 256, 32), *range(256, 384, 64), *range(384, MAX_GRAPH_TOKENS + 1, 128)]
    return [size for size in sizes if size <= largest]


def sequence_sizes(largest: int) -> list[int]:
    """Sequences of a step with prompts: 16 and beyond that four times as many each. One that has
    nothing to do costs next to nothing there.
    """
    sizes = [4**i for i in range(2, 16)]
    return [size for size in sizes if size < largest] + [largest]


def usual_shapes(
    max_num_tokens: int,
    max_num_seqs: int,
    shares_prefixes: bool,
    spreads_chunks: bool,
    most_seqs: int = PREPARED_SEQS,
) -> list[StepShape]:
    """Of steps as they usually come, those to be had first come first.

    Args:
        max_num_tokens: tokens of a step at the most.
        max_num_seqs: sequences of a step at the most.
        shares_prefixes: whether prefixes may be read once for all who share them.
        spreads_chunks: whether tokens of a prompt may be rows of their own.
        most_seqs: shapes of decodes, and of prompts beside them, for no more sequences.
    """
    decodes = [s for s in decode_sizes(min(max_num_tokens, max_num_seqs)) if s <= most_seqs]
    tokens = token_sizes(max_num_tokens)
    mixes = [
        (size, num_seqs)
        for size in tokens
        for num_seqs in sequence_sizes(max_num_seqs)
        if num_seqs <= min(size, most_seqs)
    ]
    shapes = [StepShape(True, 1, size, size, False) for size in decodes]
    if spreads_chunks:
        rows = [size for size in tokens if size <= max_num_seqs]
        shapes += (StepShape(False, 1, size, size, True) for size in rows)
        few = [mix for mix in mixes if mix[0] <= DECODE_QUERIES * mix[1]]
        shapes += (StepShape(False, DECODE_QUERIES, *mix, False) for mix in few)
    shapes += (StepShape(False, mix[0], *mix, False) for mix in mixes)
    if shares_prefixes:
        shapes += (StepShape(True, 1, size, size, True) for size in decodes)
        shapes += (StepShape(False, mix[0], *mix, True) for mix in mixes)
    return shapes
