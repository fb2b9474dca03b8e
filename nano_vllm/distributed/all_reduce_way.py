"""In which way the GPUs of a host sum: decided here for the engine and for the plan.

With n ranks and messages of `size` bytes, by our kernel (csrc/distributed/all_reduce.h), where RATE
bytes a second leave a GPU besides the flags, and PLAIN_RATE where there are none beside the data:

    one-shot    first way over the links + (n - 1) size / RATE
    two-shot    the same + HOP_SECONDS + 2 (n - 1) / n size / RATE
    plain       the same + PLAIN_SECONDS + (n - 1) size / PLAIN_RATE

One-shot is quicker than two-shot up to HOP_SECONDS RATE n / ((n - 1) (n - 2)) bytes, and with two
ranks always, as they send as much in either way. That is 216 KB with three ranks, 96 KB with four
and 27 KB with eight: computed, as two GPUs alone were measured. Plain is taken by two ranks alone:
with four it sends as many bytes as two-shot with its flags, and with more than that more.
"""

from __future__ import annotations

import math
from enum import Enum

MAX_RANKS = 8
MAX_BYTES = 4 << 20
"""Of a message of more than two ranks that is not left to NCCL. With four a sum of so many bytes
would take 39 us, by NCCL 44, and with eight 46 and 49: computed.
"""
MAX_SLICED_BYTES = 64 << 20
"""Of a message of two ranks that is not left to NCCL. Between two H200 so many bytes take 311 us
with the norm behind the sum, by NCCL and the norm's own kernel 335.
"""
SLICE_BYTES = 8 << 20
"""Of what two ranks sum in one call: messages beyond it are cut into slices."""
PLAIN_BYTES = 1 << 20
"""Of the smallest message that two ranks sum plainly. Between two H200, with the norm behind the
sum, 768 KiB take 8.7 us, and 8.4 with flags; 1 MiB 9.5 and 9.8.
"""
RATE = 180e9
"""Bytes of messages a second that leave a GPU, with as many bytes of flags beside them: measured
between two H200 over NVLink, by messages of up to 8 MiB.
"""
HOP_SECONDS = 0.8e-6
"""What the second way over the links takes longer: measured between two H200, where both ways send
as much, 0.8 us at 8 KiB, 0.6 at 256 KiB and 1.2 at 1 MiB.
"""
PLAIN_RATE = 300e9
"""Bytes of messages a second that leave a GPU without flags beside them: measured between two H200,
by messages of 1 to 8 MiB.
"""
PLAIN_SECONDS = 2.5e-6
"""What a plain sum waits longer for its flags, behind all rows of a block: of the same figures."""


class Way(Enum):
    """How ranks sum."""

    ONE_SHOT = "one-shot"
    """All send all of their rows to all others."""
    TWO_SHOT = "two-shot"
    """Each sums a share of the rows and sends the sums to all others."""
    PLAIN = "plain"
    """As one-shot, without flags beside the data."""
    NCCL = "NCCL"


def way_of(num_bytes: float, num_ranks: int) -> Way:
    """The quickest.

    Args:
        num_bytes: of each rank's tensor.
        num_ranks: GPUs of one host that can write each other's memory.
    """
    if num_ranks > MAX_RANKS or num_bytes > largest_message(num_ranks):
        return Way.NCCL
    if num_ranks == 2 and num_bytes >= PLAIN_BYTES:
        return Way.PLAIN
    return Way.ONE_SHOT if num_bytes <= one_shot_limit(num_ranks) else Way.TWO_SHOT


def one_shot_limit(num_ranks: int) -> float:
    """Bytes up to which one shot is quicker than two."""
    if num_ranks <= 2:
        return math.inf
    return HOP_SECONDS * RATE * num_ranks / ((num_ranks - 1) * (num_ranks - 2))


def largest_message(num_ranks: int) -> int:
    """Bytes of it that are not left to NCCL."""
    return MAX_SLICED_BYTES if num_ranks == 2 else MAX_BYTES


def largest_call(num_ranks: int) -> int:
    """Bytes that one call sums at most."""
    return SLICE_BYTES if num_ranks == 2 else MAX_BYTES


def slices_of(num_rows: int, row_bytes: int, max_bytes: int) -> list[slice]:
    """Rows of each of the calls that sum a message, as even as can be.

    Args:
        num_rows: of the message.
        row_bytes: of each.
        max_bytes: of a call, no fewer than of a row.
    """
    most = max_bytes // row_bytes
    count = -(-num_rows // most)
    return [slice(i * num_rows // count, (i + 1) * num_rows // count) for i in range(count)]
