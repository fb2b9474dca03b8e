"""docs/distributed.md shows what its commands print, and the examples of deployment start as many
processes as the layout needs.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from nano_vllm.distributed.all_reduce_way import Way, way_of
from nano_vllm.gpus import NVLINK_4
from nano_vllm.plan.__main__ import main
from nano_vllm.plan.communication import all_reduce_seconds
from nano_vllm.plan.setup import Layout
from tests.plan.test_step_time import ONE, PREFILL, TPOT, simulation

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "distributed.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^\$ python -m nano_vllm\.plan (.*)\n((?:.*\n)*?)```$", PAGE, re.M)
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}
MODELS = {"qwen3-0.6b": "0.6B", "llama-3.1-8b": "8B"}


def test_there_are_plans() -> None:
    assert len(PLANS) == 2


@pytest.mark.parametrize(("arguments", "shown"), PLANS, ids=[p[0] for p in PLANS])
def test_the_page_shows_what_the_command_prints(capsys: Any, arguments: str, shown: str) -> None:
    assert main(shlex.split(arguments)) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(("gpu", "model"), TPOT)
def test_the_page_compares_with_the_measured(gpu: str, model: str) -> None:
    (row,) = re.findall(rf"^\| {gpu.upper()}, {MODELS[model]} \|.*", PAGE, re.M)
    cells = re.findall(r"([\d.,]+) / ([\d.,]+) \(([+-]?\d+)%\)", row)
    modelled = simulation(gpu, model, context=256)
    expected = [(modelled.decode(ONE, b).seconds * 1e3, t) for b, t in TPOT[gpu, model].items()]
    rate = simulation(gpu, model).prefill_tokens_per_second(ONE, 4096)
    expected.append((rate, PREFILL[gpu, model]))
    assert len(cells) == len(expected)
    for (shown, measured, off), (value, known) in zip(cells, expected, strict=True):
        assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.006)
        assert float(measured.replace(",", "")) == known
        assert int(off) == round(100 * (value / known - 1))


def test_the_page_tells_what_is_expected() -> None:
    rows = re.findall(r"^\| ([\w.]+), tp (\d) x pp (\d) \| (.*) \|$", PAGE, re.M)
    assert len(rows) == 12
    for name, tp, pp, cells in rows:
        (model,) = (model for model, short in MODELS.items() if short == name)
        modelled = simulation("h200", model, context=256)
        layout = Layout(int(tp), int(pp))
        *times, rate = cells.split(" | ")
        for batch, shown in zip((1, 8, 32, 128), times, strict=True):
            seconds = modelled.decode(layout, batch).seconds
            assert float(shown) == pytest.approx(seconds * 1e3, abs=0.006)
        expected = modelled.prefill_tokens_per_second(layout, 4096)
        assert float(rate.replace(",", "")) == pytest.approx(expected, abs=501)


def test_the_page_tells_how_gpus_sum() -> None:
    rows = re.findall(
        r"^\| (\d) \| (\d+) KiB \| (?:(\d+) MiB|-) \| (?:(\d+) MiB|-) \| (.*) \|$", PAGE, re.M
    )
    assert [int(row[0]) for row in rows] == [2, 3, 4, 6, 8]
    for row in rows:
        ranks, limit = int(row[0]), int(row[1]) * UNITS["KiB"]
        assert way_of(limit - 16, ranks) is Way.ONE_SHOT
        beyond = Way.TWO_SHOT if row[2] else Way.PLAIN
        assert way_of(limit + 1024, ranks) is beyond
        limit = int(row[2] or row[3]) * UNITS["MiB"]
        assert not (row[2] and row[3])
        assert way_of(limit, ranks) is beyond
        assert way_of(limit + 1024, ranks) is Way.NCCL
        sent = [float(number) for number in re.findall(r"[\d.]+", row[4])]
        assert sent == pytest.approx(
            [2 * (ranks - 1), 4 * (ranks - 1) / ranks, ranks - 1], abs=0.05
        )


def test_the_page_compares_all_reduces_with_the_published() -> None:
    rows = re.findall(
        r"^\| (\d) x (\d+) ([KM]?i?B)(, NCCL)? \| .* \| ([\d.]+) \| .* \|$", PAGE, re.M
    )
    assert len(rows) == 12
    for ranks, size, unit, by_nccl, shown in rows:
        links = replace(NVLINK_4, peer=None) if by_nccl else NVLINK_4
        seconds = all_reduce_seconds(links, int(size) * UNITS[unit], int(ranks), 8)
        assert float(shown) == pytest.approx(seconds * 1e6, abs=0.051)


def launches() -> list[list[str]]:
    """Arguments of every torchrun on the page and in the examples."""
    job = DOCS / "deployment" / "kubernetes.yaml"
    documents = list(yaml.safe_load_all(job.read_text(encoding="utf-8")))
    (container,) = documents[-1]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    script = (DOCS / "deployment" / "nano-vllm.sbatch").read_text(encoding="utf-8")
    texts = re.findall(r"^torchrun ((?:.*\\\n)*.*)", PAGE, re.M)
    texts += re.findall(r"exec torchrun ((?:.*\\\n)*[^']*)'", script)
    lines = [shlex.split(text.replace("\\\n", " ")) for text in texts]
    return [*lines, container["args"]]


@pytest.mark.parametrize("arguments", launches(), ids=" ".join)
def test_launches_are_of_the_right_size(arguments: list[str]) -> None:
    arguments = [re.sub(r"\$\(?\w+\)?", "0", argument) for argument in arguments]
    launch = get_args_parser().parse_args(arguments)
    assert launch.module
    assert launch.training_script.startswith("nano_vllm.")
    rest = " ".join(launch.training_script_args).replace("=", " ")
    sizes = dict(re.findall(r"--(tp|pp) (\d+)", rest))
    processes = int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)
    assert processes == int(sizes["tp"]) * int(sizes.get("pp", 1))


def test_the_pods_find_each_other() -> None:
    job = DOCS / "deployment" / "kubernetes.yaml"
    names, api, pods = yaml.safe_load_all(job.read_text(encoding="utf-8"))
    name, spec = pods["metadata"]["name"], pods["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    assert names["spec"]["clusterIP"] == "None"
    assert names["spec"]["selector"]["job-name"] == api["spec"]["selector"]["job-name"] == name
    assert spec["template"]["spec"]["subdomain"] == names["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    assert f"--master_addr={name}-0.{names['metadata']['name']}" in container["args"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_the_batch_script_is_one() -> None:
    subprocess.run(["bash", "-n", str(DOCS / "deployment" / "nano-vllm.sbatch")], check=True)
