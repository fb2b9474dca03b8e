from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nano_vllm.bench.step_plot import write_plot
from nano_vllm.bench.step_report import RecordedRun, timed_steps
from tests.bench.step_records import make_record
from tests.bench.test_roofline import roofline

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("has_ceilings", [True, False])
def test_panels_say_what_they_show(tmp_path: Path, has_ceilings: bool) -> None:
    model = roofline("qwen3-0.6b")
    if not has_ceilings:
        model = replace(model, copy=None, matmul=None)
    runs = [
        RecordedRun("batch 2", timed_steps([make_record(0, 1, (8, 8)), make_record(2, 3)])),
        RecordedRun("batch 3", timed_steps([make_record(50, 53, (1, 1, 1))])),
    ]
    path = tmp_path / "steps.svg"
    write_plot(path, "a model", runs, model)
    text = path.read_text()
    shown = ["a model", "batch 2", "batch 3", "prefill", "decode, 20.0%", "16.7% in all"]
    shown += ["floor", "MBU", "MFU"] if has_ceilings else ["GB/s", "TFLOP/s", "no ceilings"]
    for words in shown:
        assert f"<!-- {words}" in text or words in text, words
    assert "mixed" not in text
    assert ("floor" in text) == has_ceilings


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "steps.png"
    steps = timed_steps([make_record(0, 1)])
    write_plot(
        path, "", [RecordedRun("", steps)], replace(roofline("qwen3-0.6b"), is_quantized=True)
    )
    assert path.read_bytes().startswith(b"\x89PNG")
