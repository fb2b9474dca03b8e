"""The benchmarks of the whole engine, each once, on a model of two narrow layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.bench.__main__ import main
from nano_vllm.bench.workload import Workload
from nano_vllm.engine.llm import LLM
from nano_vllm.step_record import PHASES

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
    *kinds, everything = result["steps"]
    assert everything["kind"] == "all"
    assert sum(row["steps"] for row in kinds) == everything["steps"]
    tokens = sum(round(row["steps"] * row["tokens"]) for row in kinds)
    assert tokens == result["input"] + result["output"] - 3, "the last of each is not computed"
    for row in result["steps"]:
        assert 0 <= row["idle"] < 1
        assert row["GB/s"] > 0
        assert (row["MBU"], row["MFU"], row["floor ms"]) == (None, None, None)
    assert [row.keys() for row in result["host us"]] == [{"kind", *PHASES}] * len(result["steps"])


def test_latency(capsys: pytest.CaptureFixture[str], model: str) -> None:
    lengths = ("--batch-sizes", "1", "3", "--input-len", "5", "--output-len", "3")
    result = run(capsys, model, "latency", *lengths)
    rows = result["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        wall = (row["first token ms"] + 2 * row["TPOT ms"]) / 1e3
        assert row["output tok/s"] == pytest.approx(3 * row["batch"] / wall)
    steady = [(row["batch"], row["steps"], row["seqs"]) for row in result["steps"]]
    assert steady == [(1, 1, 1), (3, 1, 3)], "of two decode steps the first waits for the prompts"


def test_latency_without_a_steady_step(capsys: pytest.CaptureFixture[str], model: str) -> None:
    lengths = ("--batch-sizes", "1", "--input-len", "5", "--output-len", "2")
    result = run(capsys, model, "latency", *lengths)
    assert (len(result["rows"]), result["steps"], result["host us"]) == (1, [], [])


def test_prefill(capsys: pytest.CaptureFixture[str], model: str) -> None:
    (row,) = run(capsys, model, "prefill", "--num-prompts", "2", "--input-len", "20")["rows"]
    assert row["prompt tok/s"] == pytest.approx(40 / row["wall s"])
    weights = 2 * (64 * 64 * (2 + 2 + 2) + 3 * 64 * 96)
    attention = 4 * 2 * 2 * 64 * (20 * 21 // 2) * 2
    flops = 2 * weights * 40 + attention
    assert row["TFLOP/s"] == pytest.approx(flops / row["wall s"] / 1e12)


@pytest.mark.parametrize(
    ("benchmark", "argv", "num_timed", "num_recorded"),
    [
        ("throughput", ("--num-prompts", "2", "--input-len", "4", "--output-len", "3"), 2, 1),
        ("latency", ("--batch-sizes", "1", "2", "--input-len", "4", "--output-len", "3"), 8, 2),
        ("prefill", ("--num-prompts", "2", "--input-len", "9"), 2, 1),
    ],
)
def test_the_recorded_run_is_one_of_its_own(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    tmp_path: Path,
    benchmark: str,
    argv: tuple[str, ...],
    num_timed: int,
    num_recorded: int,
) -> None:
    """And its trace has one process for each."""
    recorded: list[bool] = []
    generate = Workload.generate

    def counted(workload: Workload, llm: LLM, temperature: float) -> float:
        recorded.append(llm.engine.runner.recorder is not None)
        return generate(workload, llm, temperature)

    monkeypatch.setattr(Workload, "generate", counted)
    path = tmp_path / "trace.json"
    run(capsys, model, benchmark, *argv, "--trace", str(path))
    assert (recorded.count(False), recorded.count(True)) == (num_timed, num_recorded)
    events = json.loads(path.read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == (["batch 1", "batch 2"] if benchmark == "latency" else [benchmark])


def test_plot(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "steps.png"
    run(capsys, model, "prefill", "--num-prompts", "2", "--input-len", "9", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Said before anything runs: the model does not even exist."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    argv = ["throughput", "--model", "/no/such", "--plot", str(tmp_path / "steps.png")]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --plot needs matplotlib (pip install matplotlib): ")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_behind_the_figures(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    argv = ["prefill", "--device", "cpu", "--load-format", "dummy", "--model", model]
    assert main([*argv, "--input-len", "9", "--repeats", "1", "--trace", "/dev/full"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["benchmark"] == "prefill"
    assert err == "error: cannot write: [Errno 28] No space left on device\n"


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
        (["prefill", "--trace", "/no/such/x.json"], "No such file or directory: '/no/such/x.json'"),
        (["latency", "--trace", "/tmp"], "Is a directory: '/tmp'"),
        (["latency", "--plot", "x.txt"], "--plot must end with .png, .svg, .pdf, got x.txt"),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nosuch"], "argument BENCHMARK: invalid choice: 'nosuch'"),
        ([], "the following arguments are required: BENCHMARK"),
        (["host", "--num-sequences", "5"], "unknown option '--num-sequences'"),
        (["host", "--num-seqs", "x"], "argument --num-seqs: "),
    ],
)
def test_bad_usage_of_a_benchmark_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", "--num-seqs", "5", "--steps", "9", "--repeats", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["case"], row["ahead"]) for row in result["rows"]] == [
        (case, ahead) for case in ("steady", "ends", "turnover") for ahead in (False, True)
    ]
    for row in result["rows"]:
        assert row["step us"] > row["to launch us"] >= row["least us"] > 0


def test_prefix(capsys: pytest.CaptureFixture[str], model: str) -> None:
    lengths = ("--num-prompts", "3", "--prefix-len", "40", "--suffix-len", "2-9")
    rows = run(capsys, model, "prefix", *lengths)["rows"]
    assert [row["prompts"] for row in rows] == ["apart", "alike", "again"]
    assert [row["cached tokens"] for row in rows[:2]] == [0, 2 * 32]
    assert rows[2]["cached tokens"] >= 3 * 32
    assert rows[1]["times as fast"] == pytest.approx(rows[0]["wall s"] / rows[1]["wall s"])


def test_pace(capsys: pytest.CaptureFixture[str], model: str) -> None:
    argv = ("--num-streams", "1", "2", "--context", "3", "--input-len", "40", "--idle-tokens", "4")
    options = ("--device", "cpu", "--load-format", "dummy", "--model", model)
    assert main(["pace", *argv, *options]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["streams"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["idle p50 ms"] <= row["idle p99 ms"]
        assert 0 < row["beside p50 ms"] <= row["beside p99 ms"] <= row["beside max ms"]
        assert row["prompt tok/s"] == pytest.approx(40e3 / row["first token ms"])
