"""The benchmarks of the whole engine, each once, on a model of two narrow layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.bench.__main__ import main

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
NO_FLOOR = {"floor s": None, "floor / wall": None}


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def run(capsys: pytest.CaptureFixture[str], model: str, *argv: str) -> dict[str, Any]:
    """The JSON line of a benchmark."""
    options = ("--repeats", "1", "--device", "cpu", "--load-format", "dummy", "--model", model)
    assert main([*argv, *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["benchmark"], result["model"]) == (argv[0], "tiny")
    return result


def test_throughput(capsys: pytest.CaptureFixture[str], model: str) -> None:
    lengths = ("--num-prompts", "3", "--input-len", "2-9", "--output-len", "1-4")
    result = run(capsys, model, "throughput", *lengths)
    assert 6 <= result["input"] <= 27
    assert 3 <= result["output"] <= 12
    (row,) = result["rows"]
    assert row["engine"] == "nano_vllm"
    assert row["output tok/s"] == pytest.approx(result["output"] / row["wall s"])
    assert row["total tok/s"] == pytest.approx((result["input"] + result["output"]) / row["wall s"])
    assert row.items() >= NO_FLOOR.items(), "a CPU has none"


def test_latency(capsys: pytest.CaptureFixture[str], model: str) -> None:
    lengths = ("--batch-sizes", "1", "3", "--input-len", "5", "--output-len", "3")
    rows = run(capsys, model, "latency", *lengths)["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        wall = (row["first token ms"] + 2 * row["TPOT ms"]) / 1e3
        assert row["output tok/s"] == pytest.approx(3 * row["batch"] / wall)


def test_prefill(capsys: pytest.CaptureFixture[str], model: str) -> None:
    (row,) = run(capsys, model, "prefill", "--num-prompts", "2", "--input-len", "20")["rows"]
    assert row["prompt tok/s"] == pytest.approx(40 / row["wall s"])
    weights = 2 * (64 * 64 * (2 + 2 + 2) + 3 * 64 * 96)
    attention = 4 * 2 * 2 * 64 * (20 * 21 // 2) * 2
    flops = 2 * weights * 40 + attention
    assert row["TFLOP/s"] == pytest.approx(flops / row["wall s"] / 1e12)


def test_startup(capsys: pytest.CaptureFixture[str], model: str) -> None:
    result = run(capsys, model, "startup", "--input-len", "5")
    assert not result["tokenizer"]
    (row,) = result["rows"]
    parts = {name: seconds for name, seconds in row.items() if name not in ("run", "total")}
    assert list(parts) == [
        "python",
        "import torch",
        "import nano_vllm",
        "config",
        "build",
        "weights",
        "KV cache",
        "engine",
        "first token",
    ]
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(row["total"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["startup", "--model", "/no/such"], "model '/no/such' does not exist"),
        (["startup", "--input-len", "64"], "at most 63 tokens"),
        (["latency", "--output-len", "1"], "--output-len must be at least 2, got 1"),
        (["throughput", "--input-len", "9-5"], "input_len must be at least 1 and not fall"),
        (["throughput", "--peer", "llama.cpp"], "--peer needs a model with weights"),
        (
            ["throughput", "--peer", "transformers", "--load-format", "auto"],
            "one static batch: give --input-len and --output-len one number each",
        ),
        (["prefill"], "at most 63 tokens"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], model: str, argv: list[str], message: str
) -> None:
    command, *options = argv
    defaults = ["--device", "cpu", "--load-format", "dummy", "--model", model]
    assert main([command, *defaults, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "--num-seqs", "5", "--steps", "9", "--repeats", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["case"], row["ahead"]) for row in result["rows"]] == [
        (case, ahead) for case in ("steady", "ends", "turnover") for ahead in (False, True)
    ]
    for row in result["rows"]:
        assert row["step us"] > row["to launch us"] >= row["least us"] > 0
