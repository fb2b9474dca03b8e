"""Decode steps as CUDA graphs: one launch in place of several hundred."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from nano_vllm.batch import Batch
from nano_vllm.runner.input_batch import ModelInput

Forward = Callable[[ModelInput], torch.Tensor]
"""Inputs of a step -> logits of all of its tokens."""


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes that have a graph: 1, 2, 4, then multiples of 8 up to 256 and of 16 beyond."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, largest + 1, 16)]
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """Graphs of decode steps, captured when a batch size first comes up.

    Lengths and block tables are read from the inputs' own memory, which stays where it is: a graph
    serves any lengths.

    Args:
        forward: what is captured; it must not wait for the device.
        max_num_seqs: sequences of a step at the most.
    """

    def __init__(self, forward: Forward, max_num_seqs: int) -> None:
        self._forward = forward
        self._sizes = graph_sizes(max_num_seqs)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        """By size, and whether prefixes are shared: a kernel more."""
        self._pool: Any = None
        """Memory of all graphs: they run one after the other."""

    def size_for(self, batch: Batch) -> int | None:
        """Sequences that the step is to be padded to; None if it cannot be a graph."""
        count = len(batch.scheduled)
        if count > self._sizes[-1] or not batch.is_decode:
            return None
        return self._sizes[bisect_left(self._sizes, count)]

    def logits(self, inputs: ModelInput) -> torch.Tensor:
        """[padded size, vocab_size]; valid until the next call.

        Args:
            inputs: padded as `size_for` says.
        """
        key = inputs.input_ids.shape[0], inputs.attention.shared_prefix is not None
        if key not in self._graphs:
            # The first step of a size runs without a graph, which also loads what a capture cannot.
            logits = self._forward(inputs)
            self._graphs[key] = self._capture(inputs)
            return logits
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self, inputs: ModelInput) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._forward(inputs)
        self._pool = graph.pool()
        return graph, logits
