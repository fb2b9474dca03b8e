"""What ranks say to each other while they compute, on the device that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nano_vllm import ops
from nano_vllm.distributed.peer_memory import PeerMemory
from nano_vllm.distributed.progress import Progress


class PeerError(RuntimeError):
    """A collective failed: some other rank is gone."""


def through_host(collective: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call a collective of a group of CPUs for tensors of a GPU."""
    moved = [_on_host(arg) for arg in args]
    collective(*moved, **options)
    for arg, there in zip(args, moved, strict=True):
        _take_back(arg, there)


def _on_host(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_on_host(each) for each in arg]
    return arg.to("cpu", copy=True) if isinstance(arg, torch.Tensor) else arg


def _take_back(arg: Any, there: Any) -> None:
    if isinstance(arg, list):
        for each, moved in zip(arg, there, strict=True):
            _take_back(each, moved)
    elif isinstance(arg, torch.Tensor):
        arg.copy_(there)


class Collectives:
    """Of a rank that is alone: nothing is sent."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        return x

    def all_reduce_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += the sum over all ranks, in place; returns the RMSNorm of that, in the memory
        of x.
        """
        x = self.all_reduce(x)
        ops.fused_add_rms_norm(x, x, residual, weight, eps)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [size, ...]; the same for all ranks."""
        return x[None]

    def gather_columns(self, x: torch.Tensor, num_columns: int) -> torch.Tensor | None:
        """The ranks' columns side by side, on the first rank. Others get None, unless there are no
        rows.

        Args:
            x: [num_rows, columns of each rank].
            num_columns: of all together; what is behind them is padding.
        """
        return x[:, :num_columns]

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """The first rank's x, in place."""
        return x


class GroupCollectives(Collectives):
    """Of a rank in a process group, on the current stream of its device.

    Args:
        group: NCCL's, or Gloo's for a CPU.
        progress: told of the calls that wait for others.
        is_through_host: whether it is Gloo's for tensors of a GPU.
    """

    def __init__(self, group: Any, progress: Progress, is_through_host: bool = False) -> None:
        self._group = group
        self._is_through_host = is_through_host
        self._progress = progress
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)
        self.peers: PeerMemory | None = None
        """Sums what it takes; NCCL the rest."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.peers is not None and self.peers.takes(x):
            self.peers.all_reduce(x)
        else:
            self._call(dist.all_reduce, x)
        return x

    def all_reduce_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if self.peers is not None and self.peers.takes(x):
            self.peers.all_reduce_and_norm(x, residual, weight, eps)
            return x
        return super().all_reduce_and_norm(x, residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            self._call(dist.all_gather, list(out), x.contiguous())
        return out

    def gather_columns(self, x: torch.Tensor, num_columns: int) -> torch.Tensor | None:
        if not len(x):
            return x.new_empty(0, num_columns)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        self._call(dist.gather, x, parts, self._first)
        if parts is None:
            return None
        each = x.shape[1]
        starts = range(0, num_columns, each)
        held = [part[:, : num_columns - start] for part, start in zip(parts, starts, strict=False)]
        return torch.cat(held, dim=1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        if len(x):
            self._call(dist.broadcast, x, self._first)
        return x

    def _call(self, collective: Any, *args: Any) -> None:
        try:
            with self._progress.waiting():
                if self._is_through_host:
                    through_host(collective, *args, group=self._group)
                else:
                    collective(*args, group=self._group)
        except RuntimeError as error:
            raise PeerError(str(error)) from None


ALONE = Collectives()
