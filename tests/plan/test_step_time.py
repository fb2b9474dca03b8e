"""The model of step times: near what was measured on one GPU, and sane where nothing was."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.config import EngineConfig
from nano_vllm.distributed.all_reduce_way import SLICE_BYTES, Way
from nano_vllm.gpus import NVLINK_4, PCIE_4, find_gpu
from nano_vllm.plan.__main__ import main
from nano_vllm.plan.communication import all_reduce_seconds, seconds_within_a_host, send_seconds
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.plan.simulate import Simulation, batches

TPOT = {
    ("h200", "qwen3-0.6b"): {1: 0.97, 8: 1.04, 32: 1.30, 128: 2.35},
    ("h200", "llama-3.1-8b"): {1: 4.95, 8: 4.91, 32: 5.27, 128: 6.68},
    ("h100", "qwen3-0.6b"): {1: 1.10, 8: 1.18, 32: 1.55, 128: 2.87},
    ("h100", "llama-3.1-8b"): {1: 5.92, 8: 5.99, 32: 6.49, 128: 8.46},
}
"""Milliseconds per output token, by batch, of docs/benchmarks.md: 128 prompt, 256 output tokens."""
PREFILL = {
    ("h200", "qwen3-0.6b"): 365_000,
    ("h200", "llama-3.1-8b"): 40_600,
    ("h100", "qwen3-0.6b"): 332_000,
    ("h100", "llama-3.1-8b"): 40_500,
}
"""Prompt tokens per second of the same, prompts of 4096 tokens."""
ONE = Layout(1, 1)


def simulation(gpu: str = "h100", model: str = "llama-3.1-8b", context: int = 4096) -> Simulation:
    setup = Setup.read(EngineConfig(model=model), find_gpu(gpu), 8)
    return Simulation(setup, context, 1024)


@pytest.mark.parametrize(("gpu", "model"), TPOT)
def test_decode_steps_are_near_the_measured(gpu: str, model: str) -> None:
    modelled = simulation(gpu, model, context=256)
    for batch, measured in TPOT[gpu, model].items():
        seconds = modelled.decode(ONE, batch).seconds
        assert seconds * 1e3 == pytest.approx(measured, rel=0.11), batch


@pytest.mark.parametrize(("gpu", "model"), PREFILL)
def test_prefill_is_near_the_measured(gpu: str, model: str) -> None:
    rate = simulation(gpu, model).prefill_tokens_per_second(ONE, 4096)
    assert rate == pytest.approx(PREFILL[gpu, model], rel=0.06)


def test_larger_batches_take_longer_and_give_more() -> None:
    modelled = simulation()
    for layout in (ONE, Layout(2, 1), Layout(8, 1), Layout(4, 4)):
        steps = [modelled.decode(layout, batch) for batch in batches(256)]
        for smaller, larger in pairwise(steps):
            assert smaller.seconds <= larger.seconds
            assert smaller.tokens_per_second < larger.tokens_per_second


def test_longer_contexts_take_longer() -> None:
    seconds = [simulation(context=c).decode(ONE, 16).seconds for c in (128, 1024, 8192)]
    assert seconds == sorted(seconds)


def test_tensor_parallel_gains_less_than_its_gpus() -> None:
    modelled = simulation()
    for batch in (1, 32):
        one = modelled.decode(ONE, batch)
        for tp in (2, 4, 8):
            several = modelled.decode(Layout(tp, 1), batch)
            assert one.seconds / tp < several.seconds < one.seconds
            assert several.collectives > 0
        assert one.collectives == 0


def test_a_pipeline_fills_with_micro_batches() -> None:
    modelled = simulation()
    alone = modelled.decode(Layout(1, 4), 1)
    assert alone.bubble > 0.74  # one sequence keeps one stage of four busy
    assert alone.seconds > modelled.decode(ONE, 1).seconds
    full = modelled.decode(Layout(1, 4), 128)
    assert full.bubble < 0.15
    assert modelled.decode(ONE, 128).bubble == 0


def test_all_reduces_cost_by_size_ranks_and_hosts() -> None:
    for links in (NVLINK_4, PCIE_4):
        assert all_reduce_seconds(links, 1 << 20, 1, 8) == 0
        for ranks in (2, 4, 8, 16, 64):
            seconds = [all_reduce_seconds(links, 1 << i, ranks, 8) for i in range(10, 30)]
            assert seconds == sorted(seconds)
        for size in (1 << 13, 1 << 20, 1 << 26):
            seconds = [all_reduce_seconds(links, size, ranks, 8) for ranks in (2, 4, 8, 16, 32)]
            assert seconds == sorted(seconds)
    small, large = 8192, 64 << 20
    assert all_reduce_seconds(NVLINK_4, small, 8, 8) < 7e-6
    ring = NVLINK_4.nccl_latency + 2 * 7 / 8 * large / NVLINK_4.bus
    assert all_reduce_seconds(NVLINK_4, large, 8, 8) == ring
    without = replace(NVLINK_4, peer=None)
    assert all_reduce_seconds(without, small, 8, 8) > NVLINK_4.nccl_latency


PUBLISHED = {
    # GPUs, bytes -> seconds, of H100 on NVLink; named in docs/distributed.md
    (2, 32 << 10): 4.5e-6,
    (8, 512): 5.9e-6,
    (8, 32 << 10): 7.8e-6,
    (4, 512 << 10): 10e-6,
    (4, 2 << 20): 23e-6,
    (6, 512 << 10): 13e-6,
    (6, 1 << 20): 17e-6,
    (6, 4 << 20): 37e-6,
    (8, 16 << 20): 135.7e-6,
}
MEASURED = {
    # way, bytes -> seconds of all-reduces between two H200, of docs/benchmarks.md
    (Way.ONE_SHOT, 8 << 10): 2.7e-6,
    (Way.ONE_SHOT, 64 << 10): 2.9e-6,
    (Way.ONE_SHOT, 128 << 10): 3.3e-6,
    (Way.ONE_SHOT, 256 << 10): 4.1e-6,
    (Way.ONE_SHOT, 512 << 10): 5.5e-6,
    (Way.ONE_SHOT, 1 << 20): 8.3e-6,
    (Way.ONE_SHOT, 2 << 20): 14.0e-6,
    (Way.ONE_SHOT, 4 << 20): 25.8e-6,
    (Way.NCCL, 8 << 20): 53.4e-6,
    (Way.PLAIN, 1 << 20): 8.6e-6,
    (Way.PLAIN, 2 << 20): 12.1e-6,
    (Way.PLAIN, 4 << 20): 19.1e-6,
    (Way.PLAIN, 8 << 20): 33.1e-6,
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_all_reduces_are_near_the_published(case: tuple[int, int]) -> None:
    ranks, size = case
    seconds = all_reduce_seconds(NVLINK_4, size, ranks, 8)
    assert PUBLISHED[case] / 2 < seconds < PUBLISHED[case] * 2


@pytest.mark.parametrize(("way", "size"), MEASURED)
def test_all_reduces_of_two_are_those_measured(way: Way, size: int) -> None:
    seconds = seconds_within_a_host(NVLINK_4, size, 2, way)
    assert seconds == pytest.approx(MEASURED[way, size], rel=0.04)


def test_slices_are_summed_one_behind_the_other() -> None:
    one = all_reduce_seconds(NVLINK_4, SLICE_BYTES, 2, 8)
    assert one == seconds_within_a_host(NVLINK_4, SLICE_BYTES, 2, Way.PLAIN)
    assert all_reduce_seconds(NVLINK_4, 3 * SLICE_BYTES, 2, 8) == pytest.approx(3 * one)


def test_other_hosts_are_farther() -> None:
    for size in (0, 1 << 20):
        assert send_seconds(NVLINK_4, size, False) < send_seconds(NVLINK_4, size, True)
    modelled = simulation()
    apart = Simulation(replace(modelled.setup, gpus_per_host=4), 4096, 1024)
    layout = Layout(4, 2)
    assert apart.decode(layout, 1).seconds > modelled.decode(layout, 1).seconds
    across = Layout(8, 1)
    assert apart.decode(across, 1).seconds > modelled.decode(across, 1).seconds


def test_the_best_cluster_keeps_the_limit_and_uses_all_gpus() -> None:
    modelled = simulation()
    rates = []
    for num_gpus in (1, 2, 4, 8, 16, 1024):
        best = modelled.best(num_gpus, 0.020)
        assert best is not None
        assert best.decode.seconds <= 0.020
        assert best.dp * best.decode.layout.num_gpus == num_gpus
        assert best.decode.batch <= modelled.max_batch(best.decode.layout)
        rates.append(best.tokens_per_second / num_gpus)
    assert all(more >= fewer * 0.999 for fewer, more in pairwise(rates))
    assert modelled.best(8, 1e-6) is None


def test_a_tight_limit_asks_for_tensor_parallel() -> None:
    tight = simulation().best(8, 0.0025)
    assert tight is not None
    assert tight.decode.layout.tp > 1
    assert simulation().quickest(1).decode.layout == ONE  # type: ignore[union-attr]


def test_layouts_that_do_not_fit_are_left_out() -> None:
    small = Setup.read(EngineConfig(model="llama-3.1-8b"), find_gpu("l4", 16), 8)
    modelled = Simulation(small, 4096, 8)
    assert ONE not in set(modelled.layouts())
    assert modelled.best(1, 10.0) is None
    assert modelled.quickest(1) is None
    assert modelled.best(2, 10.0) is not None


def test_batches() -> None:
    assert batches(0) == []
    assert batches(1) == [1]
    assert batches(6) == [1, 2, 4, 6]
    assert batches(8) == [1, 2, 4, 8]


def test_the_command_prints_assumptions_and_tables(capsys: Any) -> None:
    argv = ["llama-3.1-8b", "--simulate", "--max-gpus", "8", "--max-tpot", "20"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "links: all-reduces (measured between two GPUs): one-shot" in out
    assert "clusters, at most 20 ms per output token" in out
    assert main([*argv, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = plan["clusters, at most 20 ms per output token"]
    assert [row["GPUs"] for row in rows] == [1, 2, 4, 8]
    assert all(row["ms/token"] <= 20 for row in rows)


def test_the_plot_has_a_line_for_each_layout(capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.svg"
    assert main(["llama-3.1-8b", "--simulate", "--max-gpus", "8", "--plot", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    for words in ("tp 1 x pp 1", "tp 8 x pp 2", "tokens/s of a sequence", "modelled"):
        assert words in text


def test_a_model_that_fits_nowhere_is_said(capsys: Any) -> None:
    argv = ["llama-3.1-8b", "--simulate", "--gpu-memory", "8", "--max-gpus", "2"]
    assert main([*argv, "--tp", "1", "--pp", "1"]) == 1
    assert "none fits: tp 1 x pp 1 is" in capsys.readouterr().out
