"""How the messages of the deciding rank travel, on the CPU: through memory on one host, over Gloo
between hosts.
"""

from __future__ import annotations

import mmap
import os
import platform
import time
from typing import Protocol

import numpy as np
import torch

from nano_vllm.distributed.control import Control
from nano_vllm.distributed.progress import Progress

SPIN_SECONDS = 2e-3
"""Behind a message, for the next one: longer than most steps; then with pauses."""
PAUSE_SECONDS = 50e-6
IDLE_SECONDS = 10.0
IDLE_PAUSE_SECONDS = 1e-3
_LINE = 64
"""Bytes of a cache line: each has one rank that writes into it."""


class StepChannel(Protocol):
    """From the first rank to all others; messages of several parts, in order."""

    def send(self, parts: list[torch.Tensor]) -> None:
        """Returns once they may be written again; waits for no one who has taken the message
        before.
        """
        ...

    def receive(self, part: torch.Tensor) -> None:
        """Fill the next part of the next message, which may not come for long."""
        ...

    def finish(self) -> None:
        """Behind a message's last part."""
        ...


class GlooChannel:
    """A broadcast for each part.

    Args:
        control: of all ranks.
    """

    def __init__(self, control: Control) -> None:
        self._control = control

    def send(self, parts: list[torch.Tensor]) -> None:
        for part in parts:
            if len(part):
                self._control.send(part)

    def receive(self, part: torch.Tensor) -> None:
        if len(part):
            self._control.receive(part)

    def finish(self) -> None:
        pass


class SharedMemoryChannel:
    """One message in memory that the ranks of a host share: a line with its number, a line for each
    rank with the number of the last one it took, the bytes.

    It has no name that could be left behind: others open it through the first rank's process.

    Args:
        fd: from `create`, or of the same file.
        rank: this one.
        size: ranks of the group.
        progress: told where the first rank waits for others.
    """

    def __init__(self, fd: int, rank: int, size: int, progress: Progress) -> None:
        self._memory = np.frombuffer(mmap.mmap(fd, 0), dtype=np.uint8)
        lines = self._memory[: (size + 1) * _LINE].view(np.int64)
        self._sent = lines[:1]
        self._taken = lines[_LINE // 8 :: _LINE // 8]
        self._own = self._taken[rank : rank + 1]
        self._data = self._memory[(size + 1) * _LINE :]
        self._progress = progress
        self._number = 0
        """Of the last message."""
        self._offset = 0
        """Of the next part."""

    @staticmethod
    def is_supported() -> bool:
        """Whether a number written behind the bytes is seen behind them."""
        return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")

    @staticmethod
    def create(capacity: int, size: int) -> int:
        """A file for messages of so many bytes; its descriptor."""
        fd = os.memfd_create("nano_vllm_steps")
        os.ftruncate(fd, (size + 1) * _LINE + capacity)
        return fd

    def send(self, parts: list[torch.Tensor]) -> None:
        with self._progress.waiting():
            while int(self._taken[1:].min()) < self._number:
                os.sched_yield()
        offset = 0
        for part in parts:
            values = part.numpy().view(np.uint8)
            self._data[offset : offset + len(values)] = values
            offset += len(values)
        self._number += 1
        self._sent[0] = self._number

    def receive(self, part: torch.Tensor) -> None:
        if self._offset == 0:
            self._wait()
        values = part.numpy().view(np.uint8)
        values[:] = self._data[self._offset : self._offset + len(values)]
        self._offset += len(values)

    def finish(self) -> None:
        self._number += 1
        self._offset = 0
        self._own[0] = self._number

    def _wait(self) -> None:
        begin = time.monotonic()
        while self._sent[0] == self._number:
            waited = time.monotonic() - begin
            if waited < SPIN_SECONDS:
                os.sched_yield()
            else:
                time.sleep(PAUSE_SECONDS if waited < IDLE_SECONDS else IDLE_PAUSE_SECONDS)
