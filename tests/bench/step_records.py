"""Step records made by hand."""

from __future__ import annotations

from nano_vllm.step_record import PHASES, Interval, StepRecord


def make_record(
    start: float, end: float, query_lens: tuple[int, ...] = (1, 1), context: int = 10
) -> StepRecord:
    """A step that the device computes from start to end, and for which the host does one phase
    after the other, a second each, up to the start.

    Args:
        start: in seconds.
        end: in seconds.
        query_lens: of its sequences, each of which gets a token.
        context: tokens of each sequence ahead of these.
    """
    first = start - len(PHASES)
    host = {name: Interval(first + i, first + i + 1) for i, name in enumerate(PHASES)}
    seq_lens = tuple(context + queries for queries in query_lens)
    return StepRecord(query_lens, seq_lens, len(query_lens), True, host, Interval(start, end))
