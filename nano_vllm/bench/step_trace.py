"""Recorded runs in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nano_vllm.bench.step_report import RecordedRun
from nano_vllm.step_record import Interval, StepRecord

HOST, DEVICE = 1, 2
"""Tracks of a run."""


def write_trace(path: str | Path, runs: Sequence[RecordedRun]) -> None:
    """One process a run, each from 0 on, with a track of the host's phases and one of the device's
    steps; OSError where the file cannot be written.
    """
    events = [event for number, run in enumerate(runs, 1) for event in trace_events(number, run)]
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
    Path(path).write_text(text, encoding="utf-8")


def trace_events(process: int, run: RecordedRun) -> list[dict[str, Any]]:
    """Of one run: the names of its tracks, then slices in the order of each track.

    Times are microseconds. No slice of a track begins before the one ahead of it has ended.
    """
    slices = [
        (HOST, interval, phase, number, step.record)
        for number, step in enumerate(run.steps)
        for phase, interval in step.record.host.items()
    ]
    slices += [
        (DEVICE, step.busy, step.record.kind, number, step.record)
        for number, step in enumerate(run.steps)
    ]
    origin = min((interval.start for _, interval, *_ in slices), default=0.0)
    return [
        *_names(process, run.name),
        *(
            {"ph": "X", "pid": process, "tid": track, "name": name}
            | _times(interval, origin)
            | {"args": _arguments(number, record)}
            for track, interval, name, number, record in sorted(slices, key=lambda s: s[:2])
        ),
    ]


def _names(process: int, name: str) -> Iterator[dict[str, Any]]:
    for kind, track, text in (
        ("process_name", HOST, name),
        ("thread_name", HOST, "host"),
        ("thread_name", DEVICE, "device"),
    ):
        yield {"ph": "M", "pid": process, "tid": track, "name": kind, "args": {"name": text}}


def _times(interval: Interval, origin: float) -> dict[str, float]:
    """In whole nanoseconds, so that slices that touch still do when they are rounded."""
    start, end = (round((time - origin) * 1e9) for time in interval)
    return {"ts": start / 1e3, "dur": (end - start) / 1e3}


def _arguments(number: int, record: StepRecord) -> dict[str, Any]:
    return {
        "step": number,
        "kind": record.kind,
        "sequences": record.num_seqs,
        "tokens": record.num_tokens,
        "context tokens": record.num_context_tokens,
        "graph": record.is_graph,
    }
