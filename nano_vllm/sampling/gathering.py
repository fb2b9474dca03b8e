"""How much of the logits that ranks share by vocabulary goes to the rank that samples; without
torch.
"""

from __future__ import annotations

LIKELIEST = 0
"""Nothing: each rank tells all others its likeliest token."""
WHOLE = -1
MAX_CANDIDATES = 128
"""Of a row, from each rank; rows with a larger top-k go whole. Finding twice as many takes 1.5
times as long.
"""
FEW_BYTES = 8 << 20
"""What the others may send of whole rows before candidates are quicker: computed, as 40 us between
GPUs at 200 GB/s, in which some 20 small kernels find and sort in candidates.
"""


def quickest(
    num_candidates: int, num_rows: int, vocab_size: int, itemsize: int, num_ranks: int
) -> int:
    """What ranks gather of rows for which `num_candidates` are enough: these, or WHOLE.

    Args:
        num_candidates: LIKELIEST, WHOLE, or of each rank.
        num_rows: of logits.
        vocab_size: tokens of all ranks.
        itemsize: bytes of a logit.
        num_ranks: that share the vocabulary.
    """
    sent = num_rows * vocab_size * itemsize * (num_ranks - 1) / num_ranks
    return WHOLE if num_candidates > 0 and sent <= FEW_BYTES else num_candidates


def bytes_of_row(num_candidates: int, part: int, itemsize: int) -> int:
    """Of a row of logits, from each rank.

    Args:
        num_candidates: LIKELIEST, WHOLE, or how many of its likeliest tokens a rank sends.
        part: tokens of the vocabulary that a rank has, with padding.
        itemsize: bytes of a logit.
    """
    if num_candidates == LIKELIEST:
        return 2 * 8
    if num_candidates == WHOLE:
        return part * itemsize
    return min(num_candidates, part) * (itemsize + 4) + part // 8
