"""The load generator, against the server and against numbers drawn by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.bench.__main__ import main
from nano_vllm.bench.load import Timeline
from nano_vllm.bench.serve import latencies, summary
from tests.server.running_server import RunningServer


def test_a_load(server: RunningServer, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "a.png"
    flags = "--num-prompts 12 --request-rate 50 --input-len 4-9 --output-len 8 --vocab-size 200"
    argv = ["serve", "--url", server.url, *flags.split(), "--plot", str(plot)]
    assert main([*argv, "--slo", "ttft:60000", "e2e:60000"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["benchmark"], result["failed"], result["model"]) == ("serve", 0, "tiny")
    assert [row["ms"] for row in result["rows"]] == ["TTFT", "TPOT", "ITL", "E2E"]
    for row in result["rows"]:
        assert 0 <= row["p50"] <= row["p90"] <= row["p99"] <= row["max"]
    (rates,) = result["rates"]
    assert rates["output tok/s"] == pytest.approx(12 * 8 / result["seconds"], rel=0.01)
    assert rates["good"] == 1
    assert plot.stat().st_size > 1000
    assert main([*argv[:-2], "--slo", "ttft:0.001"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rates"][0]["good"] == 0


def test_first_tokens_beside_the_engine(server: RunningServer, capsys: Any) -> None:
    flags = "--num-prompts 4 --max-concurrency 1 --input-len 9 --output-len 2 --vocab-size 200"
    assert main(["serve", "--url", server.url, *flags.split(), "--timings"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    ttft, beside = (next(r for r in rows if r["ms"] == n) for n in ("TTFT", "TTFT - engine's"))
    assert 0 < beside["p50"] < ttft["p50"]


def test_failures_are_told(server: RunningServer, capsys: Any) -> None:
    flags = ["--num-prompts", "2", "--input-len", "4"]
    assert main(["serve", "--url", server.url, *flags, "--output-len", "9000"]) == 1
    assert "all 2 requests failed; the first: status 400" in capsys.readouterr().err
    assert main(["serve", "--url", "http://127.0.0.1:9", *flags]) == 1
    assert capsys.readouterr().err.startswith("error: no OpenAI server answers at 127.0.0.1 port 9")
    assert main(["serve", "--url", "ftp://x", *flags]) == 1
    assert "must be like http://" in capsys.readouterr().err


def test_times_by_hand() -> None:
    one = Timeline(10.0, [10.5, 10.75, 11.5], num_tokens=5)
    short = Timeline(0.0, [0.25], num_tokens=1)
    assert latencies([one, short]) == {
        "TTFT": [500, 250],
        "TPOT": [250],
        "ITL": [250, 750],
        "E2E": [1500, 250],
    }
    assert summary(list(range(100, 0, -1))) == {
        "mean": 50.5,
        "p50": 50,
        "p90": 90,
        "p95": 95,
        "p99": 99,
        "max": 100,
    }
    assert summary([7])["p99"] == 7
