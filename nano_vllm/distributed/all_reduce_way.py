"""In which way the GPUs of a host sum: decided here for the engine and for the plan.

With n ranks and messages of `size` bytes, by our kernel (csrc/distributed/all_reduce.h), where RATE
bytes a second leave a GPU besides the flags:

    one-shot    first way over the links + (n - 1) size / RATE
    two-shot    the same + HOP_SECONDS + 2 (n - 1) / n size / RATE

One-shot is the quicker up to HOP_SECONDS RATE n / ((n - 1) (n - 2)) bytes, and with two ranks
always, as they send as much in either way. That is 216 KB with three ranks, 96 KB with four and
27 KB with eight: computed, as two GPUs alone were measured.
"""

from __future__ import annotations

import math
from enum import Enum

MAX_RANKS = 8
MAX_BYTES = 4 << 20
"""Of a message that is not left to NCCL. With two ranks a sum of so many bytes takes 25.8 us, by
NCCL 40.3; with four it would take 39, by NCCL 44, and with eight 46 and 49: computed.
"""
RATE = 180e9
"""Bytes of messages a second that leave a GPU, with as many bytes of flags beside them: measured
between two H200 over NVLink, by messages of up to 8 MiB.
"""
HOP_SECONDS = 0.8e-6
"""What the second way over the links takes longer: measured between two H200, where both ways send
as much, 0.8 us at 8 KiB, 0.6 at 256 KiB and 1.2 at 1 MiB.
"""


class Way(Enum):
    """How ranks sum."""

    ONE_SHOT = "one-shot"
    """All send all of their rows to all others."""
    TWO_SHOT = "two-shot"
    """Each sums a share of the rows and sends the sums to all others."""
    NCCL = "NCCL"


def way_of(num_bytes: float, num_ranks: int) -> Way:
    """The quickest.

    Args:
        num_bytes: of each rank's tensor.
        num_ranks: GPUs of one host that can write each other's memory.
    """
    if num_ranks > MAX_RANKS or num_bytes > MAX_BYTES:
        return Way.NCCL
    return Way.ONE_SHOT if num_bytes <= one_shot_limit(num_ranks) else Way.TWO_SHOT


def one_shot_limit(num_ranks: int) -> float:
    """Bytes up to which one shot is quicker than two."""
    if num_ranks <= 2:
        return math.inf
    return HOP_SECONDS * RATE * num_ranks / ((num_ranks - 1) * (num_ranks - 2))
