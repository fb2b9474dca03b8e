"""What the engine counts, and the ranges that a profiler sees."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

_NO_RANGE = nullcontext()


@dataclass(slots=True)
class EngineMetrics:
    """Counters since the engine started, and how full it is now. Set by Engine."""

    num_steps: int = 0
    num_finished_requests: int = 0
    """Aborted ones included."""
    num_aborted_requests: int = 0
    """Requests of which a completion was aborted."""
    num_prompt_tokens: int = 0
    """Of finished requests, as are the next two."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache: what was saved."""
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_running: int = 0
    """Sequences that hold blocks."""
    num_waiting: int = 0
    num_loaded_tokens: int = 0
    """Copied back from host memory."""
    num_leaked_blocks: int = 0
    """Blocks to which somebody lost references, which the engine took back: should be 0."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that no sequence holds; some of them may serve as prefix cache."""

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of the prompt tokens that came from the prefix cache; 0 where there are none."""
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)


class LapTimer:
    """Seconds of phases that follow one another.

    Args:
        clock: seconds, from any start.
        start: when the first phase began, by this clock; by default now.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, start: float | None = None
    ) -> None:
        self._clock = clock
        self._start = self._last = clock() if start is None else start
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a phase; the next one begins."""
        now = self._clock()
        self.laps[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds until the last lap's end."""
        return self._last - self._start


class _NvtxRange:
    __slots__ = ("_name", "_nvtx")

    def __init__(self, nvtx: Any, name: str) -> None:
        self._nvtx = nvtx
        self._name = name

    def __enter__(self) -> None:
        self._nvtx.range_push(self._name)

    def __exit__(self, *error: object) -> None:
        self._nvtx.range_pop()


def nvtx_range(name: str) -> AbstractContextManager[None]:
    """A named range in Nsight's timeline; nothing where the process does not use CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return _NO_RANGE
    return _NvtxRange(torch.cuda.nvtx, name)
