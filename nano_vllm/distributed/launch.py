"""Which of torchrun's processes this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nano_vllm.config import EngineConfig


@dataclass(frozen=True)
class Launch:
    """What torchrun has put into the environment; one process alone where it has not."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of the host: the number of its GPU."""
    address: str = ""
    """Of the rendezvous, as is the port."""
    port: int = 0
    is_under_agent: bool = False
    """Whether torchrun serves the rendezvous; else the first rank does."""
    attempt: str = "0"
    """Of torchrun's starts of the same group: each has its own keys in the store."""
    shares_gpus: bool = False
    """Whether several ranks may have one GPU, to try them out. NCCL refuses that: what they say to
    each other goes through the host, and steps are no CUDA graphs.
    """

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """ValueError for a variable that is missing beside others, or is no number."""
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if world_size == 1:
            return cls()
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK must be in [0, WORLD_SIZE = {world_size}), got {rank}")
        if not environment.get("MASTER_ADDR"):
            raise ValueError("MASTER_ADDR is not set beside RANK: start with torchrun")
        return cls(
            rank,
            world_size,
            _number(environment, "LOCAL_RANK"),
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
            is_under_agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            shares_gpus=environment.get("NANO_VLLM_SHARE_GPUS") == "1",
        )

    def check(self, config: EngineConfig) -> None:
        """ValueError where there are more or fewer processes than the options need."""
        tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
        if self.world_size == tp * pp:
            return
        options = f"tensor_parallel_size = {tp} and pipeline_parallel_size = {pp}"
        start = f"torchrun --nproc_per_node={tp * pp} -m nano_vllm.generate --tp {tp} --pp {pp} ..."
        raise ValueError(
            f"{options} need {tp * pp} processes, got {self.world_size}; on one host: {start}"
        )

    def check_replicas(self, data_parallel_size: int) -> None:
        """ValueError for several replicas in torchrun's processes, which are ranks of one."""
        if self.world_size > 1 and data_parallel_size > 1:
            raise ValueError(
                f"data_parallel_size must be 1 under torchrun, got {data_parallel_size}: its "
                f"{self.world_size} processes are one replica; without torchrun the server starts "
                f"the ranks of all replicas itself, on this host"
            )


ALONE = Launch()


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None:
        raise ValueError(f"{name} is not set beside the other variables of torchrun")
    if not value.isdecimal():
        raise ValueError(f"{name} must be a number, got {value!r}")
    return int(value)
