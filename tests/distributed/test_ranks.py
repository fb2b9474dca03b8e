"""Ranks of a group generate what one process does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from nano_vllm.config import ModelConfig
from nano_vllm.distributed.partition import vocabulary_part
from nano_vllm.distributed.stages import split_layers
from nano_vllm.sampling.gathering import bytes_of_row
from tests.conftest import SEED
from tests.distributed import rank_functions
from tests.distributed.launch_ranks import free_port, start_ranks
from tests.distributed.rank_functions import (
    TOP_K,
    VOCAB_SIZE,
    bench_throughput,
    generate_all,
    options_of,
    serve_ids,
)
from tests.models.checkpoints import make_checkpoint
from tests.server.running_server import make_tiny_model

SECONDS = 120


def results_of(
    folder: Path, size: int, options: dict[str, Any], seed: int, **environment: str
) -> dict[str, Any]:
    ranks = start_ranks(generate_all, size, folder, options, seed, **environment)
    codes = ranks.join(SECONDS)
    assert codes == [0] * size, [ranks.errors(rank) for rank in range(size)]
    check_steps(folder, size, options.get("tensor_parallel_size", 1))
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def check_steps(folder: Path, size: int, tp: int) -> None:
    """In each step all ranks had the same blocks and tokens, those that sample also the same new
    ones.
    """
    notes = [(folder / f"steps.{rank}").read_text(encoding="utf-8") for rank in range(size)]
    assert all(note == notes[0] for note in notes[:tp])
    steps = [[line.split()[0] for line in note.splitlines()] for note in notes]
    assert len(steps[0]) > 50
    assert all(found == steps[0] for found in steps)


def check_same(found: Any, expected: Any) -> None:
    """All but log-probabilities to the bit."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    elif isinstance(expected, (list, dict)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        keys = expected if isinstance(expected, dict) else range(len(expected))
        for key in keys:
            check_same(found[key], expected[key])
    else:
        assert found == expected


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[str, Any]]:
    """A model, a seed of requests, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("one process")
    make_checkpoint(folder / "model", num_hidden_layers=3)
    seed = random.Random(f"{SEED} {__name__}").getrandbits(63)
    results = results_of(folder, 1, options_of(str(folder / "model")), seed)
    assert results["preemptions"]
    assert results["cached"]
    assert results["loaded"]
    return folder / "model", seed, results


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
def test_ranks_generate_the_same(
    tmp_path: Path, expected: tuple[Path, int, dict[str, Any]], tp: int, pp: int
) -> None:
    model, seed, results = expected
    print(f"to repeat: NANO_VLLM_TEST_SEED={SEED}")
    options = options_of(str(model), tensor_parallel_size=tp, pipeline_parallel_size=pp)
    check_same(results_of(tmp_path, tp * pp, options, seed), results)
    if tp > 1:
        part = vocabulary_part(VOCAB_SIZE, tp)
        sent = set(json.loads((tmp_path / "sent.json").read_text(encoding="utf-8")))
        # A prompt of 30 tokens takes two steps: the first ones may sample without it.
        assert sent <= {bytes_of_row(count, part, 4) for count in (3, TOP_K)}
        assert bytes_of_row(TOP_K, part, 4) in sent


def test_ranks_share_a_gpu(
    tmp_path: Path, expected: tuple[Path, int, dict[str, Any]], device: str
) -> None:
    """What they say to each other goes through the host: copies, where that is the device too."""
    model, seed, results = expected
    options = options_of(
        str(model), tensor_parallel_size=2, pipeline_parallel_size=2, device=device
    )
    check_same(results_of(tmp_path, 4, options, seed, NANO_VLLM_SHARE_GPUS="1"), results)


def test_ranks_of_two_hosts_generate_the_same(
    tmp_path: Path, expected: tuple[Path, int, dict[str, Any]]
) -> None:
    """Each has a torchrun of its own; steps go over the network."""
    model, seed, results = expected
    options = options_of(str(model), tensor_parallel_size=2)
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    run += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    ranks = ["-m", rank_functions.__name__, str(tmp_path), json.dumps(options), str(seed)]
    agents = [
        subprocess.Popen(
            [*run, f"--node_rank={host}", *ranks],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for host in range(2)
    ]
    try:
        errors = [agent.communicate(timeout=SECONDS)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()  # whose ranks then miss the store
    assert [agent.returncode for agent in agents] == [0, 0], errors
    check_steps(tmp_path, 2, 2)
    check_same(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")), results)


def test_the_bubble_is_printed(tmp_path: Path, expected: tuple[Path, int, dict[str, Any]]) -> None:
    model, _, _ = expected
    options = {"model": str(model), "device": "cpu", "dtype": "float32", "pp": 2}
    ranks = start_ranks(bench_throughput, 2, tmp_path, options)
    assert ranks.join(SECONDS) == [0, 0], [ranks.errors(rank) for rank in range(2)]
    *_, line = (tmp_path / "out.0").read_text(encoding="utf-8").splitlines()
    result = json.loads(line)
    (row,) = result["rows"]
    assert 0 < row["bubble"] < 1
    assert row["bubble"] == result["steps"][-1]["idle"]


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    """torchrun ... -m nano_vllm.generate --tp 2: what one process prints is printed once."""
    model = make_tiny_model(tmp_path / "model")
    flags = ["--prompt", "ab", "--prompt", "c", "--temperature", "0", "--max-tokens", "9"]
    flags += ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--num-blocks", "128"]
    alone = [sys.executable, "-m", "nano_vllm.generate", *flags]
    many = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *alone[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = [
        subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=SECONDS, env=environment
        ).stdout
        for command in (alone, [*many, "--tp", "2"])
    ]
    assert printed[0].strip()
    assert printed[1] == printed[0]


def test_two_ranks_serve(tmp_path: Path, expected: tuple[Path, int, dict[str, Any]]) -> None:
    """The first rank's engine is a process of the server's; a signal to the server ends all."""
    model, _, _ = expected
    port = free_port()
    options = options_of(str(model), tensor_parallel_size=2, skip_tokenizer_init=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags.remove("--skip-tokenizer-init=True")
    ranks = start_ranks(serve_ids, 2, tmp_path, [*flags, "--skip-tokenizer-init", f"--port={port}"])
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + SECONDS
        while not is_ready(url):
            assert time.monotonic() < end, [ranks.errors(rank) for rank in range(2)]
            time.sleep(0.1)
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert len(answer["choices"][0]["token_ids"]) == 6
        ranks.processes[0].terminate()
        assert ranks.join(30) == [0, 0], [ranks.errors(rank) for rank in range(2)]
    finally:
        ranks.kill()


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


@pytest.mark.parametrize(
    ("num_layers", "vocab_size", "num_stages", "counts"),
    [
        (8, 8, 1, [8]),
        (8, 8, 2, [4, 4]),
        (8, 8, 3, [3, 3, 2]),
        # The head weighs as much as 3 layers.
        (9, 3 * 12 * 64, 2, [6, 3]),
        (4, 99 * 12 * 64, 3, [2, 1, 1]),
    ],
)
def test_stages_cost_the_same(
    num_layers: int, vocab_size: int, num_stages: int, counts: list[int]
) -> None:
    # A layer: 12 * hidden_size^2 weights.
    config = ModelConfig("X", vocab_size, 64, 128, num_layers, 1, 1, 96, 64, 1e-5, 1e4)
    stages = split_layers(config, num_stages)
    assert [len(stage.layers) for stage in stages] == counts
    assert [i for stage in stages for i in stage.layers] == list(range(num_layers))
    assert [stage.is_first for stage in stages] == [i == 0 for i in range(num_stages)]
    assert [stage.is_last for stage in stages] == [i + 1 == num_stages for i in range(num_stages)]


def test_more_stages_than_layers_are_refused() -> None:
    config = ModelConfig("X", 99, 64, 128, 2, 1, 1, 96, 64, 1e-5, 1e4)
    with pytest.raises(ValueError, match="at most num_layers = 2, got 3"):
        split_layers(config, 3)
