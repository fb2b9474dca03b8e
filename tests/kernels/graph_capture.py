"""Captures work on tensors that stay where they are in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    run()  # kernels are loaded before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph
