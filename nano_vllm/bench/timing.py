"""Times device work: medians over cold inputs, by CUDA graphs on a GPU, by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPEATS = 15
CALLS_PER_GRAPH = 20


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call: the median over repeats.

    Args:
        calls: the same work on different inputs, taken in turn, so that no call finds its inputs in
            a cache. They
            neither synchronise nor depend on one another.
        device: where the work runs.
    """
    for call in calls:
        call()
    if device.type == "cuda":
        return _cuda_graph_seconds(calls)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for call in calls:
            call()
        seconds.append((time.perf_counter() - start) / len(calls))
    return statistics.median(seconds)


def _cuda_graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    rounds = -(-CALLS_PER_GRAPH // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / (rounds * len(calls)))
    return statistics.median(seconds)


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets to rotate so that together they pass three times the device's last-level
    cache.
    """
    cache = 64 * 2**20
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(CALLS_PER_GRAPH, -(-3 * cache // max(1, bytes_per_set))))


def _long_call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """For calls of milliseconds, beside which a launch is nothing: one by one, not in a graph."""
    if device.type != "cuda":
        return median_seconds([call], device)
    call()
    seconds = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def copy_ceiling(device: torch.device) -> float:
    """Bytes per second, read and written, of the device's own large copy."""
    numel = 2**32 if device.type == "cuda" else 2**27
    source = torch.randint(0, 256, (numel,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * numel / _long_call_seconds(lambda: target.copy_(source), device)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of torch's own large matrix product on random data."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _long_call_seconds(lambda: a @ b, device)
