"""How the processes of a group find each other, and what is said where they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nano_vllm import LLM
from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import Launch
from tests.distributed.launch_ranks import start_ranks
from tests.distributed.rank_functions import generate_with_own_seeds, options_of
from tests.models.checkpoints import make_checkpoint

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


def test_ranks_that_differ_say_in_what(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    options = options_of(str(tmp_path / "model"), tensor_parallel_size=2)
    ranks = start_ranks(generate_with_own_seeds, 2, tmp_path / "run", options)
    assert ranks.join(60) == [1, 1]
    for rank in range(2):
        assert "rank 1 on " in ranks.errors(rank)
        assert "differs from rank 0 on " in ranks.errors(rank)
        assert "seed is 1 in place of 0" in ranks.errors(rank)
