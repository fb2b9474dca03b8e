"""`python -m nano_vllm.plan`: memory is the engine's; what does not fit is said with numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.gpus import GIB, GPUS, find_gpu
from nano_vllm.plan.__main__ import main
from nano_vllm.plan.communication import Communication
from nano_vllm.plan.fit import fit, layouts
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.runner.cuda_graphs import StepGraphs
from nano_vllm.runner.memory import DeviceMemory, num_kv_blocks
from nano_vllm.runner.model_runner import ModelRunner

LLAMA_70B = ModelConfig(
    "LlamaForCausalLM", 128256, 8192, 28672, 80, 64, 8, 128, 131072, 1e-5, 5e5, dtype="bfloat16"
)
ONE = Layout(1, 1)


def setup_of(model: ModelConfig | str, gpu: str = "h100", **options: Any) -> Setup:
    if isinstance(model, str):
        return Setup.read(EngineConfig(model=model, **options), find_gpu(gpu), 8)
    return Setup.of(model, EngineConfig(**options), find_gpu(gpu), 8)


def test_a_real_engine_has_as_many_blocks_and_bytes(tiny_checkpoint: Path) -> None:
    options: dict[str, Any] = {
        "model": str(tiny_checkpoint),
        "dtype": "float32",
        "kv_cache_memory": 3_000_000,
        "block_size": 8,
        "max_num_seqs": 4,
    }
    runner = ModelRunner(EngineConfig(device="cpu", **options))
    planned = fit(setup_of(**options), ONE, 100)
    assert planned.num_blocks == runner.num_blocks > 0
    tensors = [*runner.model.parameters(), *runner.model.buffers()]
    assert planned.stages[0].weights == sum(t.nbytes for t in tensors)
    assert runner.kv_cache is not None
    assert planned.num_blocks * planned.stages[0].block_bytes == runner.kv_cache.pool.nbytes


@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama-3.1-8b"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_the_blocks_are_those_of_the_engine_on_such_a_gpu(
    model: str, kv_cache_dtype: str, enforce_eager: bool
) -> None:
    setup = setup_of(model, kv_cache_dtype=kv_cache_dtype, enforce_eager=enforce_eager)
    planned = fit(setup, ONE, 1000)
    (stage,) = planned.stages
    taken = stage.context + stage.weights + stage.fixed
    assert planned.num_blocks == num_kv_blocks(
        setup.config,
        setup.model,
        setup.max_model_len,
        setup.max_num_batched_tokens,
        torch.bfloat16.itemsize,
        (torch.bfloat16 if kv_cache_dtype == "auto" else torch.float8_e4m3fn).itemsize,
        DeviceMemory(setup.gpu.memory - taken, setup.gpu.memory),
    )
    room = setup.gpu.memory * setup.config.gpu_memory_utilization
    used = taken + stage.activations + stage.graphs + planned.num_blocks * stage.block_bytes
    assert room - stage.block_bytes - 2 < used <= room


def test_a_large_model_needs_several_gpus() -> None:
    setup = setup_of(LLAMA_70B)
    alone, pair, four = (fit(setup, Layout(tp, 1), 8192) for tp in (1, 2, 4))
    assert not alone.fits
    assert alone.missing > 60 * GIB
    assert alone.num_blocks == 0 == alone.max_concurrency
    assert not pair.fits
    assert four.fits
    assert four.missing == 0
    assert fit(setup, Layout(2, 2), 8192).fits


def test_missing_is_what_would_make_it_fit() -> None:
    setup = setup_of("llama-3.1-8b", "rtx-4090")
    found = fit(setup, ONE, 131072)
    assert found.missing > 0
    share = setup.config.gpu_memory_utilization
    grown = replace(setup.gpu, memory=setup.gpu.memory + int((found.missing + 64) / share))
    assert fit(replace(setup, gpu=grown), ONE, 131072).fits
    grown = replace(setup.gpu, memory=setup.gpu.memory + int((found.missing - 64) / share))
    assert not fit(replace(setup, gpu=grown), ONE, 131072).fits


def test_graphs_captured_ahead_are_counted() -> None:
    setup = setup_of("llama-3.1-8b")
    graphs = StepGraphs(
        setup.max_num_batched_tokens,
        setup.config.max_num_seqs,
        shares_prefixes=True,
        spreads_chunks=True,
    )
    half = replace(setup, model=replace(setup.model, num_layers=16))
    (all_layers,), (half_of_them,) = (fit(s, ONE, 100).stages for s in (setup, half))
    layers = all_layers.graphs - half_of_them.graphs
    assert layers == 16 * (40 << 10) * len(graphs._usual)
    assert len(graphs._usual) == 230  # as docs/distributed.md says
    eager = setup_of("llama-3.1-8b", enforce_eager=True)
    assert fit(eager, ONE, 100).stages[0].graphs == 0


def test_more_ranks_leave_more_room() -> None:
    setup = setup_of(LLAMA_70B)
    for pp in (1, 2, 4):
        fits = [fit(setup, Layout(tp, pp), 4096) for tp in (1, 2, 4, 8)]
        for fewer, more in pairwise(fits):
            assert max(s.weights for s in more.stages) < max(s.weights for s in fewer.stages)
            assert more.num_tokens >= fewer.num_tokens
            assert more.missing <= fewer.missing
    for tp in (1, 2, 4, 8):
        fits = [fit(setup, Layout(tp, pp), 4096) for pp in (1, 2, 4, 8)]
        for fewer, more in pairwise(fits):
            assert more.num_tokens >= fewer.num_tokens


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    setup = replace(setup_of(LLAMA_70B), gpus_per_host=16)
    tokens = [fit(setup, Layout(tp, 1), 100).stages[0].block_bytes for tp in (4, 8, 16)]
    assert tokens[0] == 2 * tokens[1] == 2 * tokens[2]


def test_the_fullest_stage_tells_the_blocks() -> None:
    found = fit(setup_of("llama-3.1-8b"), Layout(1, 4), 4096)
    assert [len(stage.place.layers) for stage in found.stages] == [9, 9, 8, 6]
    holds = [stage.pool // stage.block_bytes for stage in found.stages]
    assert found.num_blocks == min(holds) < max(holds)
    assert len(found.fullest.place.layers) == 9
    assert found.fullest.place.is_first  # and it has the embedding


def test_options_tell_the_pool() -> None:
    told = fit(setup_of("qwen3-0.6b", num_blocks=100), ONE, 160)
    assert (told.num_blocks, told.num_tokens, told.max_concurrency) == (100, 1600, 10)
    assert told.fits
    too_few = fit(setup_of("qwen3-0.6b", num_blocks=100), ONE, 160, 11)
    assert too_few.missing == 10 * too_few.stages[0].block_bytes
    too_many = fit(setup_of("qwen3-0.6b", num_blocks=1 << 20), ONE, 160)
    assert not too_many.fits
    half = fit(setup_of("qwen3-0.6b", kv_cache_dtype="fp8"), ONE, 160)
    whole = fit(setup_of("qwen3-0.6b"), ONE, 160)
    assert half.num_blocks // 2 == whole.num_blocks


def test_fewer_long_sequences_fit() -> None:
    setup = setup_of("llama-3.1-8b")
    counts = [fit(setup, ONE, context).max_concurrency for context in (16, 17, 4096, 131072)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == fit(setup, ONE, 1).num_blocks
    held = counts[2]
    assert fit(setup, ONE, 4096, held).fits
    assert not fit(setup, ONE, 4096, held + 1).fits


def test_communication_is_counted() -> None:
    setup = setup_of("llama-3.1-8b")
    none = Communication.of(setup, ONE)
    assert (none.all_reduces, none.sends, none.all_reduce_bytes, none.send_bytes) == (0, 0, 0, 0)
    moved = Communication.of(setup, Layout(2, 4))
    assert moved.all_reduces == 2 * 32 + 1
    assert moved.all_reduce_bytes == 65 * 4096 * 2
    assert (moved.sends, moved.send_bytes) == (3, 3 * 4096 * 2)
    assert moved.greedy_bytes == 16
    assert moved.top_k_bytes == 64128 // 8 + 128 * (2 + 4)
    assert moved.logits_bytes * 2 == 128256 * 2
    assert (none.greedy_bytes, none.top_k_bytes, none.logits_bytes) == (0, 0, 0)


def test_layouts_are_those_that_divide() -> None:
    nine = replace(LLAMA_70B, num_heads=9, num_kv_heads=3, intermediate_size=1536, num_layers=3)
    found = list(layouts(setup_of(nine), 8))
    assert found == [Layout(1, 1), Layout(3, 1), Layout(1, 2), Layout(3, 2)]


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_table_tells_what_fits(capsys: Any) -> None:
    code, out, _ = run(capsys, "llama-3.1-8b", "--gpu", "rtx-4090")
    assert code == 0
    assert "GiB short" in out
    assert "cheapest that fits: tp 2 x pp 1, 2 GPUs" in out
    code, out, _ = run(capsys, "llama-3.1-8b", "--gpu", "rtx-4090", "--tp", "1", "--pp", "1")
    assert code == 1
    assert "none fits: tp 1 x pp 1 is 12." in out


def test_one_size_leaves_the_other_open(capsys: Any) -> None:
    _, out, _ = run(capsys, "qwen3-0.6b", "--tp", "2", "--json")
    assert {(row["tp"], row["pp"]) for row in json.loads(out)["memory"]} == {
        (2, pp) for pp in (1, 2, 4, 8)
    }
    _, out, _ = run(capsys, "qwen3-0.6b", "--pp", "3", "--json")
    assert {(row["tp"], row["pp"]) for row in json.loads(out)["memory"]} == {
        (tp, 3) for tp in (1, 2, 4)
    }


def test_json_has_the_numbers(capsys: Any) -> None:
    argv = ("llama-3.1-8b", "--tp", "8", "--pp", "2", "--json", "--context", "4096")
    _, out, _ = run(capsys, *argv)
    plan = json.loads(out)
    (row,) = plan["memory"]
    assert [stage["layers"] for stage in row["stages"]] == [[0, 17], [17, 32]]
    assert row["max_concurrency"] == row["num_tokens"] // 4096
    assert plan["communication"][0]["all_reduces"] == 65


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--tp", "3"), "tensor_parallel_size must divide num_heads = 32, got 3"),
        (("--pp", "33"), "pipeline_parallel_size must be at most num_layers = 32, got 33"),
        (("--context", "131073"), "context must be at most 131072, got 131073"),
        (("--max-model-len", "131073"), "max_model_len must be at most the model's context"),
    ],
)
def test_what_cannot_be_is_one_line(capsys: Any, argv: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, "llama-3.1-8b", *argv)
    assert code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--gpu", "h1000"), f"gpu must be one of {', '.join(GPUS)}, got 'h1000'"),
        (("--gpu-memory", "0"), "gpu_memory must be GiB, more than 0, got 0.0"),
        (("--gpu-memory", "nan"), "gpu_memory must be GiB, more than 0, got nan"),
        (("--tp", "0"), "must be an integer in [1, 1048576], got '0'"),
        (("--tp", "two"), "must be an integer in [1, 1048576], got 'two'"),
        (("--block-size", "5"), "block_size must be a multiple of 8 in [8, 256], got 5"),
        (("--max-tpot", "-1"), "max_tpot must be milliseconds, more than 0, got -1.0"),
        (("--plot", "x.png"), "--plot needs --simulate"),
        (("--simulate", "--plot", "x.txt"), "--plot must end with .png, .svg, .pdf, got x.txt"),
        (("--gpus",), "unknown option '--gpus'; did you mean"),
    ],
)
def test_bad_usage_is_one_line(capsys: Any, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["llama-3.1-8b", *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_it_runs_without_torch_and_a_gpu() -> None:
    code = (
        "import sys; from nano_vllm.plan.__main__ import main; "
        "from nano_vllm.models.registry import SUPPORTED, model_family; "
        "[model_family(architecture) for architecture in SUPPORTED]; "
        "main(['qwen3-0.6b', '--simulate', '--json', '--max-gpus', '16']); main(['qwen3-0.6b']); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
