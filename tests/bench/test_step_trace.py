"""A trace is JSON of events that a viewer can lay out: no slice within another."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.bench.step_report import RecordedRun, timed_steps
from nano_vllm.bench.step_trace import write_trace
from nano_vllm.step_record import PHASES, StepRecord
from tests.bench.step_records import make_record


def trace(path: Path, *runs: list[StepRecord]) -> list[dict[str, Any]]:
    write_trace(path, [RecordedRun(f"run {i}", timed_steps(r)) for i, r in enumerate(runs)])

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    result = json.loads(path.read_text(), parse_constant=no_constant)
    return result["traceEvents"]


def check_tracks(events: list[dict[str, Any]]) -> None:
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    for slices in tracks.values():
        assert min(duration for _, duration in slices) >= 0
        for (start, duration), (following, _) in pairwise(slices):
            # whole nanoseconds, as a viewer reads them
            assert round((start + duration) * 1e3) <= round(following * 1e3)


def test_slices_of_host_and_device(tmp_path: Path) -> None:
    records = [make_record(1000, 1002, (8, 1)), make_record(1008.5, 1009)]
    events = trace(tmp_path / "trace.json", records)
    check_tracks(events)
    names = [(e["name"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [("process_name", "run 0"), ("thread_name", "host"), ("thread_name", "device")]
    host = [e for e in events if e["ph"] == "X" and e["tid"] == 1]
    assert [e["name"] for e in host] == [*PHASES, *PHASES]
    assert host[0]["ts"] == 0, "the earliest of all"
    device = [e for e in events if e["ph"] == "X" and e["tid"] == 2]
    assert [(e["name"], e["ts"], e["dur"]) for e in device] == [
        ("mixed", 6e6, 2e6),
        ("decode", 14.5e6, 0.5e6),
    ]
    assert device[0]["args"] == host[0]["args"]
    assert device[0]["args"] == {
        "step": 0,
        "kind": "mixed",
        "sequences": 2,
        "tokens": 9,
        "context tokens": 29,
        "graph": True,
    }


def test_runs_are_processes_of_their_own_from_0_on(tmp_path: Path) -> None:
    events = trace(tmp_path / "trace.json", [make_record(0, 1)], [make_record(500, 501)])
    check_tracks(events)
    starts = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            starts[event["pid"]].append(event["ts"])
    assert [min(times) for times in starts.values()] == [0, 0]


def test_no_slice_begins_within_another(tmp_path: Path, seed: int) -> None:
    """Steps of any times, which touch, and some of which overlap on the device."""
    draw = random.Random(seed)
    now, records = 5e5, []
    for _ in range(300):
        start = now + len(PHASES)
        records.append(make_record(start, start + draw.random() * 8))
        now = start + draw.choice((0.0, draw.random() * 1e-6))
    check_tracks(trace(tmp_path / "trace.json", records))


def test_the_check_sees_overlap() -> None:
    slices = [
        {"ph": "X", "pid": 1, "tid": 1, "ts": 0.0, "dur": 2.0},
        {"ph": "X", "pid": 1, "tid": 1, "ts": 1.999, "dur": 2.0},
    ]
    with pytest.raises(AssertionError):
        check_tracks(slices)
