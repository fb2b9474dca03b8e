"""A step as the deciding rank tells it to the others: a header of fixed layout, the staging buffer
as it is, and a list of numbers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from nano_vllm.distributed.step_channel import StepChannel
from nano_vllm.runner.input_batch import StagedInput
from nano_vllm.sampling.gathering import WHOLE

Pairs = list[tuple[int, int]]

MAGIC = 0x6E616E6F_0001
STEP, STOP = range(2)
_NUM_LISTS = 5
HEADER = struct.Struct(f"<{5 + len(StagedInput._fields) + 1 + _NUM_LISTS}q")
"""Magic, kind, number, checksum, numbers in the lists; a StagedInput; how many candidates
are gathered; the length of each list, where -1 is for none.
"""
_CHECKSUM = 3


@dataclass(slots=True)
class Step:
    """What all ranks do in a step. Set by ModelRunner."""

    staged: StagedInput
    num_candidates: int = WHOLE
    """Of each row, from each rank to the one that samples; LIKELIEST chooses where the logits are.
    """
    block_copies: Pairs = field(default_factory=list)
    """As in Batch, as are the next two."""
    swap_outs: Pairs = field(default_factory=list)
    swap_ins: Pairs = field(default_factory=list)
    logit_ranges: Pairs = field(default_factory=list)
    """First and last + 1 of tokens whose logits are wanted, for prompt_logprobs; gathered too."""
    fed_rows: list[int] | None = None
    """Batch.ahead_rows."""


def most_bytes(staging: torch.Tensor, num_blocks: int, num_rows: int) -> int:
    """Of a message.

    Args:
        staging: the buffer that it may hold.
        num_blocks: of the KV cache: each comes at most once in a list of pairs.
        num_rows: tokens and sequences of a step.
    """
    return HEADER.size + staging.numel() + 8 * (3 * 2 * num_blocks + 3 * num_rows)


class StepSender:
    """Of the deciding rank.

    Args:
        channel: to the others.
    """

    def __init__(self, channel: StepChannel) -> None:
        self._channel = channel
        self._number = 0

    def send(self, step: Step, staging: torch.Tensor) -> None:
        """Returns when the others have begun to take it, not when they have done it."""
        lists = [step.block_copies, step.swap_outs, step.swap_ins, step.logit_ranges]
        numbers = np.fromiter(
            chain(*(chain.from_iterable(pairs) for pairs in lists), step.fed_rows or ()), np.int64
        )
        num_fed = -1 if step.fed_rows is None else len(step.fed_rows)
        payload = staging[: step.staged.num_bytes]
        self._send(
            STEP, [*step.staged, step.num_candidates, *map(len, lists), num_fed], payload, numbers
        )

    def stop(self) -> None:
        """The others' last message."""
        fields = HEADER.size // 8 - 5
        self._send(STOP, [0] * fields, torch.empty(0, dtype=torch.uint8), np.empty(0, np.int64))

    def _send(
        self, kind: int, fields: list[int], payload: torch.Tensor, numbers: npt.NDArray[np.int64]
    ) -> None:
        header = [MAGIC, kind, self._number, 0, len(numbers), *fields]
        header[_CHECKSUM] = checksum(header, payload, numbers)
        self._number += 1
        message = torch.tensor(header, dtype=torch.int64)
        self._channel.send([message, payload, torch.from_numpy(numbers)])


class StepReceiver:
    """Of the other ranks.

    Args:
        channel: from the deciding rank.
    """

    def __init__(self, channel: StepChannel) -> None:
        self._channel = channel
        self._number = 0

    def receive(self, staging_of: Callable[[int], torch.Tensor]) -> Step | None:
        """Wait for the next step; None behind the last one. RuntimeError for a message that is not
        the next one, or has been changed on its way.

        Args:
            staging_of: slot -> the staging buffer that gets the bytes of the first rank's, once it
                may be written.
        """
        message = torch.empty(HEADER.size // 8, dtype=torch.int64)
        self._channel.receive(message)
        header = message.tolist()
        magic, kind, number, found, num_numbers = header[:5]
        if magic != MAGIC or number != self._number or kind not in (STEP, STOP):
            raise RuntimeError(
                f"expected message {self._number} of kind {MAGIC:#x}, got {number} of {magic:#x}"
            )
        staged = StagedInput(*header[5 : 5 + len(StagedInput._fields)])
        payload = staging_of(staged.slot)[: staged.num_bytes]
        numbers = torch.empty(num_numbers, dtype=torch.int64)
        for part in (payload, numbers):
            self._channel.receive(part)
        self._channel.finish()
        header[_CHECKSUM] = 0
        expected = checksum(header, payload, numbers.numpy())
        if found != expected:
            raise RuntimeError(
                f"message {number} has checksum {found:#010x} in place of {expected:#010x}"
            )
        self._number += 1
        if kind == STOP:
            return None
        return _step(staged, header[5 + len(StagedInput._fields) :], numbers.tolist())


def _step(staged: StagedInput, fields: list[int], numbers: list[int]) -> Step:
    num_candidates, *lengths, num_fed = fields
    lists: list[Pairs] = []
    at = 0
    for length in lengths:
        end = at + 2 * length
        lists.append(list(zip(numbers[at:end:2], numbers[at + 1 : end : 2], strict=True)))
        at = end
    fed_rows = None if num_fed < 0 else numbers[at:]
    copies, swap_outs, swap_ins, logit_ranges = lists
    return Step(staged, num_candidates, copies, swap_outs, swap_ins, logit_ranges, fed_rows)


def checksum(header: list[int], payload: torch.Tensor, numbers: npt.NDArray[np.int64]) -> int:
    """CRC-32 of a message whose header has 0 in its place."""
    crc = zlib.crc32(HEADER.pack(*header))
    return zlib.crc32(numbers.data, zlib.crc32(payload.numpy().data, crc))
