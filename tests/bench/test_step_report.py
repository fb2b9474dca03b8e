"""Gaps, idle shares and rates of steps made by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from nano_vllm.bench.report import report
from nano_vllm.bench.step_report import (
    figures,
    idle_share,
    rows_by_kind,
    steady_decode,
    tables,
    timed_steps,
)
from nano_vllm.step_record import PHASES
from tests.bench.step_records import make_record
from tests.bench.test_roofline import COPY, MATMUL, roofline


def test_gaps_between_steps() -> None:
    steps = timed_steps([make_record(10, 12), make_record(13, 14), make_record(14, 18)])
    assert [step.gap for step in steps] == [0, 1, 0]
    assert [step.busy for step in steps] == [(10, 12), (13, 14), (14, 18)]
    assert idle_share(steps) == 1 / 8
    assert idle_share(steps[:1]) == 0


def test_what_overlaps_counts_once() -> None:
    """The second begins in the first and outlasts it, the third is within, the fourth is alone."""
    records = [make_record(0, 4), make_record(3, 8), make_record(5, 6), make_record(10, 11)]
    random.shuffle(records)
    steps = timed_steps(records)
    assert [step.busy for step in steps] == [(0, 4), (4, 8), (8, 8), (10, 11)]
    assert [step.gap for step in steps] == [0, 0, 0, 2]
    assert idle_share(steps) == 2 / 11


def test_gaps_and_busy_times_are_all_of_the_time(seed: int) -> None:
    draw = random.Random(seed)
    starts = [draw.random() * 50 for _ in range(30)]
    records = [make_record(start, start + draw.random() * 3) for start in starts]
    steps = timed_steps(records)
    total = sum(step.gap + step.busy.seconds for step in steps)
    last = max(record.device.end for record in records)
    assert total == pytest.approx(last - min(starts))
    # the same, by looking at many moments
    moments = [min(starts) + (last - min(starts)) * (i + 0.5) / 20_000 for i in range(20_000)]
    idle = sum(not any(r.device.start <= t < r.device.end for r in records) for t in moments)
    assert idle_share(steps) == pytest.approx(idle / len(moments), abs=0.01)


def test_steady_decode_is_that_of_the_whole_batch_behind_another_decode() -> None:
    steps = timed_steps(
        [
            make_record(0, 1, (8, 8)),
            make_record(3, 4),  # waited for the prompts
            make_record(4, 5),
            make_record(5.5, 6.5),
            make_record(7, 8, (1, 8)),
            make_record(9, 10),
            make_record(10, 11),
            make_record(13, 14, (1,)),  # the other has ended
        ]
    )
    steady = steady_decode(steps)
    assert [step.record.device.start for step in steady] == [4, 5.5, 10]
    assert idle_share(steady) == 0.5 / 3.5
    assert steady_decode(steps[:2]) == []


def test_rates_of_a_step() -> None:
    """A second of llama-3.1-8b, two sequences; floors by hand."""
    model = roofline("llama-3.1-8b")
    decode = figures(timed_steps([make_record(0, 1, context=99)]), model)
    kv = 2 * 100 * 2 * 32 * 8 * 128 * 2
    num_bytes = model.step_weight_bytes + kv
    assert decode["GB/s"] == pytest.approx(num_bytes / 1e9)
    assert decode["MBU"] == pytest.approx(num_bytes / COPY)
    assert decode["floor ms"] == pytest.approx(num_bytes / COPY * 1e3), "memory is what bounds it"
    flops = 2 * 2 * (model.layer_weights + 128_256 * 4096) + 4 * 32 * 32 * 128 * 200
    assert decode["TFLOP/s"] == pytest.approx(flops / 1e12)
    assert decode["MFU"] == pytest.approx(flops / MATMUL)
    assert (decode["steps"], decode["graphs"], decode["seqs"], decode["tokens"]) == (1, 1, 2, 2)
    assert (decode["context"], decode["device ms"], decode["idle"]) == (200, 1000, 0)
    assert decode["host us"] == dict.fromkeys(PHASES, 1e6)
    prompt = figures(timed_steps([make_record(0, 1, (4096,), context=0)]), model)
    assert prompt["floor ms"] == pytest.approx(prompt["MFU"] * 1e3), "operations bound it"


def test_a_row_for_each_kind_and_one_for_all() -> None:
    model = roofline("qwen3-0.6b")
    records = [make_record(0, 1, (8, 8)), make_record(2, 3), make_record(3, 5)]
    prefill, decode, everything = rows_by_kind(timed_steps(records), model)
    assert [row["kind"] for row in (prefill, decode, everything)] == ["prefill", "decode", "all"]
    assert [row["steps"] for row in (prefill, decode, everything)] == [1, 2, 3]
    assert (decode["device ms"], decode["gap us"]) == (1500, 0.5e6)
    assert [prefill["idle"], decode["idle"], everything["idle"]] == [0, 1 / 4, 1 / 5]
    assert everything["GB/s"] == pytest.approx((prefill["GB/s"] + 3 * decode["GB/s"]) / 4)


def test_what_is_not_known_is_none() -> None:
    model = replace(roofline("qwen3-0.6b"), copy=None, matmul=None)
    steps = timed_steps([make_record(0, 1)])
    row = figures(steps, model)
    assert (row["MBU"], row["MFU"], row["floor ms"]) == (None, None, None)
    assert row["GB/s"] > 0
    row = figures(steps, replace(model, is_quantized=True))
    assert row["GB/s"] is None
    assert row["TFLOP/s"] > 0


def test_tables_follow_the_benchmark_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_by_kind(timed_steps([make_record(0, 1)]), roofline("qwen3-0.6b"))
    report("latency", {"device": "x"}, [{"batch": 1}], more=tables(rows) | {"none": []})
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:6] == ["", "steps"]
    assert lines[6].split()[:3] == ["kind", "steps", "graphs"]
    assert lines[10:12] == ["", "host us"]
    assert lines[12].split() == ["kind", *PHASES]
    assert len(lines) == 17, "no table without rows"
    result = json.loads(lines[-1])
    assert result["rows"] == [{"batch": 1}]
    assert [row["kind"] for row in result["steps"]] == ["decode", "all"]
    assert result["host us"][0] == {"kind": "decode", **dict.fromkeys(PHASES, 1e6)}
    assert result["none"] == []
