"""What each step of the engine did, and when: on the host by phase, on the device as a whole."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from nano_vllm.batch import Batch
from nano_vllm.metrics import nvtx_range

PHASES = ("schedule", "prepare", "forward", "sample", "wait", "update")
"""Of a step, on the host, in this order. On a GPU forward and sample launch, and wait waits; before
it the step behind may be launched."""
KINDS = ("prefill", "mixed", "decode")


class Interval(NamedTuple):
    """Seconds, both by the recorder's clock."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. Set by StepRecorder."""

    query_lens: tuple[int, ...]
    """Tokens that each sequence advances by."""
    seq_lens: tuple[int, ...]
    """Tokens that each sequence attends over, those included."""
    num_sampled: int
    """Sequences that get a token."""
    is_graph: bool
    host: dict[str, Interval]
    """By phase."""
    device: Interval
    """From the copy of the step's inputs to that of its tokens, without copies of blocks. A GPU's
    waits for the host between two kernels of a step are inside.
    """

    @property
    def kind(self) -> str:
        """One of KINDS. A prompt's single token counts as a decode, whose cost it has."""
        if max(self.query_lens) == 1:
            return "decode"
        return "prefill" if min(self.query_lens) > 1 else "mixed"

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def num_context_tokens(self) -> int:
        return sum(self.seq_lens)


class DeviceEvent(Protocol):
    """A point in the device's work, as is `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this point to the other."""


class ClockEvent:
    """An event of a CPU, which has done what was launched.

    Args:
        clock: seconds, from any start.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._time = 0.0

    def record(self) -> None:
        self._time = self._clock()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: ClockEvent, /) -> float:
        return (end_event._time - self._time) * 1e3


@dataclass(slots=True)
class _OpenStep:
    start: DeviceEvent
    host: dict[str, Interval] = field(default_factory=dict)
    # set by StepRecorder.end
    end: DeviceEvent | None = None
    query_lens: tuple[int, ...] = ()
    seq_lens: tuple[int, ...] = ()
    num_sampled: int = 0
    is_graph: bool = False


class StepRecorder:
    """Keeps what the steps of an engine do; give it to `Engine.record_steps`.

    Waits for the device when it is made and when it is read, not in between.

    Args:
        new_event: makes the events that are put around a step's work on the device.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        new_event: Callable[[], DeviceEvent] = ClockEvent,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._new_event = new_event
        self._clock = clock
        self._next = _OpenStep(new_event())
        self._launched: deque[_OpenStep] = deque()
        self._done: list[_OpenStep] = []
        self._origin = new_event()
        self._origin.record()
        self._origin.synchronize()
        self._origin_time = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One of PHASES, of the step it belongs to: wait and update of the oldest under way, the
        others of the next. An attempt to schedule that yields no step is not kept.
        """
        start = self._clock()
        try:
            with nvtx_range(name):
                yield
        except BaseException:
            self._launched.clear()  # the engine computes them again
            raise
        step = self._launched[0] if name in ("wait", "update") else self._next
        step.host[name] = Interval(start, self._clock())
        if name == "update":
            self._done.append(self._launched.popleft())

    def begin(self) -> None:
        """The device's work on the next step begins."""
        self._next.start.record()

    def end(self, batch: Batch, is_graph: bool) -> None:
        """The device's work on this batch is launched."""
        step, self._next = self._next, _OpenStep(self._new_event())
        step.end = self._new_event()
        step.end.record()
        # Now, as the sequences move on; behind the launch, where the host would wait anyway.
        step.query_lens = tuple(s.num_tokens for s in batch.scheduled)
        step.seq_lens = tuple(
            batch.start(row) + s.num_tokens for row, s in enumerate(batch.scheduled)
        )
        step.num_sampled = sum(s.samples for s in batch.scheduled)
        step.is_graph = is_graph
        self._launched.append(step)

    def records(self) -> list[StepRecord]:
        """Of the steps whose results are in, as they came. The device's clock is set by the host's
        once, in the beginning: beside the host's intervals its own may lie some 10 us off, beside
        one another they do not.
        """
        records = []
        last, now = self._origin, self._origin_time
        for step in self._done:
            assert step.end is not None
            step.end.synchronize()
            start = now + last.elapsed_time(step.start) / 1e3
            last, now = step.end, start + step.start.elapsed_time(step.end) / 1e3
            records.append(
                StepRecord(
                    step.query_lens,
                    step.seq_lens,
                    step.num_sampled,
                    step.is_graph,
                    step.host,
                    Interval(start, now),
                )
            )
        return records


def step_range(name: str, recorder: StepRecorder | None) -> AbstractContextManager[None]:
    """A phase of a step: a range in Nsight's timeline, and in the records, where they are kept.

    Args:
        name: one of PHASES.
        recorder: keeps the records; None for none.
    """
    return nvtx_range(name) if recorder is None else recorder.phase(name)
