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
