"""Hidden states on their way from stage to stage."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nano_vllm.distributed.collectives import PeerError, through_host
from nano_vllm.distributed.progress import Progress

STAGE_PATIENCE = 600.0
"""Seconds: on a CPU, which waits here, a stage may take long for a step."""


class Pipeline:
    """Of one stage, which is all there is."""

    stage = 0
    num_stages = 1

    def receive(self, x: torch.Tensor) -> None:
        """Fill x with what the stage before sends."""
        raise AssertionError("there is no stage before")

    def send(self, x: torch.Tensor) -> None:
        """To the stage behind."""
        raise AssertionError("there is no stage behind")


class PipelineRank(Pipeline):
    """Of a rank of one of several stages, which deals with its likes of the stages beside: all
    ranks of a stage have the same hidden states. The last stage is that of the first ranks: what
    its head scores is sampled where it is.

    Args:
        rank: this one.
        tensor_parallel_size: ranks of a stage.
        num_stages: of the pipeline.
        progress: told of the calls that wait for others.
        is_through_host: as in GroupCollectives.
    """

    def __init__(
        self,
        rank: int,
        tensor_parallel_size: int,
        num_stages: int,
        progress: Progress,
        is_through_host: bool = False,
    ) -> None:
        self.num_stages = num_stages
        self.stage = num_stages - 1 - rank // tensor_parallel_size
        self._before, self._behind = rank + tensor_parallel_size, rank - tensor_parallel_size
        self._progress = progress
        self._is_through_host = is_through_host

    def receive(self, x: torch.Tensor) -> None:
        self._call(dist.recv, x, self._before)

    def send(self, x: torch.Tensor) -> None:
        self._call(dist.send, x, self._behind)

    def _call(self, transfer: Any, x: torch.Tensor, peer: int) -> None:
        try:
            with self._progress.waiting(STAGE_PATIENCE):
                if self._is_through_host:
                    through_host(transfer, x, peer)
                else:
                    transfer(x, peer)
        except RuntimeError as error:
            raise PeerError(str(error)) from None


ONE_STAGE = Pipeline()
