"""Ranks that are threads of one process."""

from __future__ import annotations

import threading

import torch

from nano_vllm.distributed.collectives import Collectives


class ThreadRanks(Collectives):
    """One of them; it counts what it sends.

    Args:
        rank: this one.
        meeting: of all of them.
        table: where they put what they have.
    """

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[torch.Tensor]) -> None:
        self.rank, self.size = rank, meeting.parties
        self._meeting, self._table = meeting, table
        self.num_bytes = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.all_gather(x).sum(dim=0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.num_bytes += x.nbytes
        self._table[self.rank] = x
        self._meeting.wait()
        everything = torch.stack(self._table)
        self._meeting.wait()
        return everything

    def gather_columns(self, x: torch.Tensor, num_columns: int) -> torch.Tensor | None:
        everything = self.all_gather(x)
        return torch.cat(list(everything), dim=1)[:, :num_columns] if self.rank == 0 else None


def thread_ranks(size: int) -> list[ThreadRanks]:
    """All of them."""
    meeting = threading.Barrier(size, timeout=60)
    table = [torch.empty(0)] * size
    return [ThreadRanks(rank, meeting, table) for rank in range(size)]
