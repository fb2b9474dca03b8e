"""The command as a whole, on a grid of two tiny shapes."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

import pytest

from nano_vllm.bench import attention_grid, attention_rows, kernels, timing
from nano_vllm.bench.attention_grid import decode, mixed, prefill
from nano_vllm.bench.attention_inputs import AttentionInputs


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_grid, "CPU_DECODES", [decode(2, 19)])
    monkeypatch.setattr(attention_grid, "CPU_PREFILLS", [prefill(1, 9)])
    monkeypatch.setattr(attention_grid, "CPU_MIXES", [])
    monkeypatch.setattr(timing, "copy_ceiling", lambda device: 2e9)
    monkeypatch.setattr(timing, "matmul_ceiling", lambda device, dtype: 3e12)
    monkeypatch.setattr(timing, "REPEATS", 2)


def run(*options: str) -> None:
    parser = ArgumentParser()
    kernels.add_arguments(parser)
    kernels.run(parser.parse_args(["--device", "cpu", *options]))


def test_last_line_is_all_of_it_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("--models", "smollm2", "qwen3-0.6b", "--only", "attention")
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["copy GB/s"] == 2
    assert result["matmul TFLOP/s"] == 3
    assert result["peers"].startswith("torch ")
    assert [(row["heads"], row["shape"]) for row in result["rows"]] == [
        ("9/3x64", "2 x 19"),
        ("9/3x64", "1 x 9"),
        ("16/8x128", "2 x 19"),
        ("16/8x128", "1 x 9"),
    ]
    for row in result["rows"]:
        assert row["torch / ours"] == pytest.approx(row["torch us"] / row["us"])
    assert len(err.splitlines()) == 4, "each row as soon as it is there"


def test_float8_cache(capsys: pytest.CaptureFixture[str]) -> None:
    run("--only", "attention", "--peers", "--fp8-cache")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 2
    for row in result["rows"]:
        assert row["fp8 cache / ours"] == pytest.approx(row["fp8 cache us"] / row["us"])


def test_block_sizes_are_measured_next_to_one_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def inputs(*arguments: Any) -> AttentionInputs:
        made = AttentionInputs(*arguments)
        used.append(made.pool.shape[3])
        return made

    monkeypatch.setattr(attention_rows, "AttentionInputs", inputs)
    monkeypatch.setattr(attention_rows, "input_sets", lambda size, device: 1)
    run("--only", "attention", "--block-sizes", "16", "64", "8", "16")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["shape"], row["block_size"]) for row in result["rows"]] == [
        (shape, block_size) for shape in ("2 x 19", "1 x 9") for block_size in (16, 64, 8)
    ]
    assert used == [16, 64, 8] * 2
    assert all(row["us"] > 0 for row in result["rows"])


def test_impossible_block_size_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="multiples of 8 from 8 to 256, got 20"):
        run("--block-sizes", "16", "20")


def test_decodes_beside_prefills_and_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = mixed(decode(2, 19), prefill(1, 9, prefix=4))
    monkeypatch.setattr(attention_grid, "CPU_MIXES", shapes)
    run("--only", "mixed")
    both, alone, decodes = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert both["shape"] == "1 x 9 on 4 beside 2 x 19"
    assert both["torch us"] is None, "no batches of different lengths"
    floors = [row["of ceiling"] * row["us"] for row in (both, alone, decodes)]
    assert floors[0] == pytest.approx(floors[1] + floors[2])
    assert both["rate"] * both["us"] == pytest.approx(alone["rate"] * alone["us"])


def test_no_peers(capsys: pytest.CaptureFixture[str]) -> None:
    run("--only", "decode", "--peers")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peers"] == "none"
    assert not [key for key in result["rows"][0] if "ours" in key]


def test_unknown_part_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="--only 'z' is in none of the names"):
        run("--only", "z")


def test_sampling_is_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever models are asked for."""
    run("--only", "sample_tokens", "--models", "smollm2", "qwen3-0.6b")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len({row["shape"] for row in rows}) == len(rows) == 12
    assert all(row["torch us"] > 0 for row in rows)
