"""How the processes of a group find each other, and what is said where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_vllm import LLM
from nano_vllm.config import EngineConfig
from nano_vllm.distributed.collectives import ALONE
from nano_vllm.distributed.launch import Launch
from nano_vllm.distributed.process_groups import ParallelState
from tests.distributed.launch_ranks import start_ranks
from tests.distributed.rank_functions import (
    generate_slowly,
    generate_with_own_seeds,
    generate_with_own_weights,
    options_of,
)
from tests.models.checkpoints import make_checkpoint, write_gguf
from tests.sockets import listening

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchruns_environment() -> None:
    launch = Launch.from_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert launch == Launch(1, 2, 1, "127.0.0.1", 29500, is_under_agent=True)
    assert Launch.from_environment({}) == Launch()
    assert Launch.from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Launch()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK must be a number, got 'x'"),
        ({"RANK": "2"}, r"RANK must be in \[0, WORLD_SIZE = 2\), got 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT must be a number"),
    ],
)
def test_a_broken_environment(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Launch.from_environment(TORCHRUN | changes)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (
            {"tensor_parallel_size": 2},
            {},
            "need 2 processes, got 1; .* torchrun --nproc_per_node=2",
        ),
        ({}, TORCHRUN, "tensor_parallel_size = 1 and .* need 1 processes, got 2"),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 3},
            TORCHRUN,
            "need 6 processes, got 2; .* torchrun --nproc_per_node=6 .* --tp 2 --pp 3",
        ),
    ],
)
def test_as_many_processes_as_the_options_need(
    options: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Launch.from_environment(environment).check(EngineConfig(**options))


def test_an_llm_of_two_ranks_alone(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=2"):
        LLM(str(tiny_checkpoint), tensor_parallel_size=2)


def test_one_process_has_no_group(tiny_checkpoint: Path) -> None:
    with LLM(**options_of(str(tiny_checkpoint))) as llm:
        parallel = llm.engine.runner.parallel
        assert type(parallel) is ParallelState
        assert parallel.tp is ALONE
        assert llm.engine.runner.channel is None
        assert not torch.distributed.is_initialized()


def test_ranks_listen_at_the_address_of_the_rendezvous_alone(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    ranks = start_ranks(
        generate_slowly, 2, tmp_path, options_of(str(tiny_checkpoint), tensor_parallel_size=2)
    )
    try:
        ranks.wait_for_step(1)
        found = listening(process.pid or 0 for process in ranks.processes)
        assert ("127.0.0.1", ranks.port) in found
        assert {address for address, _ in found} == {"127.0.0.1"}
    finally:
        ranks.kill()


@pytest.mark.parametrize(
    ("function", "model", "what"),
    [
        (generate_with_own_seeds, "0", "seed is 1 in place of 0"),
        (generate_with_own_weights, "{RANK}", "the hash of a row of each tensor is "),
        (generate_with_own_weights, "{RANK}.gguf", "the hash of a row of each tensor is "),
    ],
)
def test_ranks_that_differ_say_in_what(
    tmp_path: Path, function: Callable[..., None], model: str, what: str
) -> None:
    """Also where one has other weights of the same shapes."""
    for seed in range(2):
        write_gguf(make_checkpoint(tmp_path / str(seed), seed), tmp_path / f"{seed}.gguf")
    options = options_of(str(tmp_path / model), tensor_parallel_size=2)
    ranks = start_ranks(function, 2, tmp_path / "run", options)
    assert ranks.join(60) == [1, 1]
    for rank in range(2):
        assert "rank 1 on " in ranks.errors(rank)
        assert "differs from rank 0 on " in ranks.errors(rank)
        assert what in ranks.errors(rank)
