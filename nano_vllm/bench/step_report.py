"""What the steps of a recorded run say: how long the device was idle, and how near each kind of
step came to the device's ceilings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nano_vllm.bench.roofline import Roofline, share
from nano_vllm.step_record import KINDS, PHASES, Interval, StepRecord


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step, and what it adds to the device's time behind those that began before it."""

    record: StepRecord
    gap: float
    """Seconds before it in which the device was idle: host work that was not hidden. 0 of the
    first.
    """
    busy: Interval
    """Its own time, without what an earlier step overlaps."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The steps of a run, and its name in pictures."""

    name: str
    steps: list[TimedStep]


def timed_steps(records: Iterable[StepRecord]) -> list[TimedStep]:
    """By their beginning on the device. All gaps and busy times together are the time from the
    first beginning to the last end.
    """
    steps = []
    latest = None
    for record in sorted(records, key=lambda record: record.device):
        start, end = record.device
        latest = start if latest is None else latest
        busy = Interval(max(start, latest), max(end, latest))
        steps.append(TimedStep(record, busy.start - latest, busy))
        latest = busy.end
    return steps


def idle_share(steps: Sequence[TimedStep]) -> float:
    """Of the time of at least one step and of the gap before each, that of the gaps."""
    gaps = sum(step.gap for step in steps)
    return gaps / (gaps + _busy_seconds(steps))


def steady_decode(steps: Sequence[TimedStep]) -> list[TimedStep]:
    """Decode steps of as many sequences as any has, each right behind another decode step."""
    decodes = [
        step
        for before, step in pairwise(steps)
        if before.record.kind == step.record.kind == "decode"
    ]
    most = max((step.record.num_seqs for step in decodes), default=0)
    return [step for step in decodes if step.record.num_seqs == most]


def rows_by_kind(steps: Sequence[TimedStep], roofline: Roofline) -> list[dict[str, Any]]:
    """`figures` of each kind of step that came up, and of all."""
    by_kind = {kind: [step for step in steps if step.record.kind == kind] for kind in KINDS}
    return [
        {"kind": kind} | figures(own, roofline)
        for kind, own in {**by_kind, "all": steps}.items()
        if own
    ]


def figures(steps: Sequence[TimedStep], roofline: Roofline) -> dict[str, Any]:
    """Of at least one step: means of a step, rates and shares of all. None without a ceiling."""
    records = [step.record for step in steps]
    seconds = _busy_seconds(steps)
    floor = _sum(roofline.step_seconds(record) for record in records)
    num_bytes = _sum(roofline.step_bytes(record) for record in records)
    flops = sum(roofline.step_flops(record) for record in records)

    def mean(value: Callable[[StepRecord], float]) -> float:
        return sum(map(value, records)) / len(records)

    return {
        "steps": len(records),
        "graphs": sum(record.is_graph for record in records),
        "seqs": mean(lambda record: record.num_seqs),
        "tokens": mean(lambda record: record.num_tokens),
        "context": mean(lambda record: record.num_context_tokens),
        "device ms": seconds / len(records) * 1e3,
        "floor ms": None if floor is None else floor / len(records) * 1e3,
        "gap us": sum(step.gap for step in steps) / len(records) * 1e6,
        "idle": idle_share(steps),
        "GB/s": None if num_bytes is None else num_bytes / seconds / 1e9,
        "MBU": share(_seconds_at(roofline.copy, num_bytes), seconds),
        "TFLOP/s": flops / seconds / 1e12,
        "MFU": share(_seconds_at(roofline.matmul, flops), seconds),
        "host us": {
            phase: mean(lambda record, phase=phase: record.host[phase].seconds) * 1e6  # type: ignore[misc]
            for phase in PHASES
        },
    }


def tables(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that begin with what they are of and go on with `figures`, for `report`: the device's
    part and the host's, which both begin alike.
    """
    device, host = [], []
    for row in rows:
        (name, value), *rest = row.items()
        device.append({name: value} | {key: figure for key, figure in rest if key != "host us"})
        host.append({name: value} | row["host us"])
    return {"steps": device, "host us": host}


def _busy_seconds(steps: Iterable[TimedStep]) -> float:
    return sum(step.busy.seconds for step in steps)


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _seconds_at(ceiling: float | None, amount: float | None) -> float | None:
    return None if ceiling is None or amount is None else amount / ceiling
