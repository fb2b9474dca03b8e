"""Times device work: medians over cold inputs, by CUDA graphs on a GPU, by the clock on a CPU."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPEATS = 15
CALLS_PER_GRAPH = 20


def median_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call: the median over repeats. Arguments as for `repeat_timer`."""
    return alternate([repeat_timer(calls, device)])[0]


def alternate(timers: Sequence[Callable[[], float]]) -> list[float]:
    """Medians of timers that take turns (first, second, first, second, ...), so that all find the
    device as hot and its clock as low.
    """
    rounds = [[timer() for timer in timers] for _ in range(REPEATS)]
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def repeat_timer(
    calls: Sequence[Callable[[], object]], device: torch.device
) -> Callable[[], float]:
    """Warms the calls up and returns what runs all of them and says the seconds of one.

    Args:
        calls: the same work on different inputs, taken in turn, so that no call finds its inputs in
            a cache. They neither synchronise nor depend on one another.
        device: where the work runs.
    """
    for call in calls:
        call()
    return _graph_timer(calls) if device.type == "cuda" else _clock_timer(calls)


def _clock_timer(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    def repeat() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    return repeat


def _graph_timer(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    rounds = -(-CALLS_PER_GRAPH // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # a capture that fails leaves its own stream current; the outer one comes back regardless.
    # Threads of NCCL's may go on meanwhile.
    capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), capture:
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()  # whatever fails on the device fails here
    return lambda: _event_seconds(graph.replay) / (rounds * len(calls))


def _event_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets to rotate so that together they pass three times the device's last-level
    cache.
    """
    cache = 64 * 2**20
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(CALLS_PER_GRAPH, -(-3 * cache // max(1, bytes_per_set))))


def free_bytes(device: torch.device) -> float:
    """What can still be allocated on a GPU; a CPU's own grid is small."""
    if device.type != "cuda":
        return math.inf
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _long_call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """For calls of milliseconds, beside which a launch is nothing: one by one, not in a graph."""
    if device.type != "cuda":
        return median_seconds([call], device)
    call()
    return statistics.median(_event_seconds(call) for _ in range(REPEATS))


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
