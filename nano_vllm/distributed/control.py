"""What the deciding rank tells the others beside their devices' work, on the CPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nano_vllm.distributed.collectives import PeerError
from nano_vllm.distributed.progress import Progress

FOREVER = timedelta(days=365)
"""A server may be idle for as long; who is gone is for the watchdog to say."""


class Control:
    """A group of all ranks over Gloo; what is sent arrives in the order of the calls.

    Args:
        progress: told of the calls that wait for others.
    """

    def __init__(self, progress: Progress) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=FOREVER)
        self._progress = progress

    def send(self, x: torch.Tensor) -> None:
        """To all others, which may have to end a step first."""
        with self._progress.waiting():
            self._call(dist.broadcast, x, 0)

    def receive(self, x: torch.Tensor) -> None:
        """The first rank's x, of the same size, in place; it may not come for long."""
        self._call(dist.broadcast, x, 0)

    def minimum(self, values: list[int]) -> list[int]:
        """The smallest of all ranks, of each value."""
        x = torch.tensor(values)
        with self._progress.waiting():
            self._call(dist.all_reduce, x, dist.ReduceOp.MIN)
        return x.tolist()

    def _call(self, collective: Any, *args: Any) -> None:
        try:
            collective(*args, group=self._group)
        except RuntimeError as error:
            raise PeerError(str(error)) from None
