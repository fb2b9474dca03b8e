"""What the benchmarks of the whole engine have in common."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano_vllm.bench.workload import positive
from nano_vllm.cli import add_engine_arguments

if TYPE_CHECKING:
    import torch

    from nano_vllm.bench.roofline import Roofline
    from nano_vllm.config import ModelConfig
    from nano_vllm.engine.llm import LLM


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Repeats, and the engine's options: token ids need no tokenizer, and with a prefix cache the
    repeats would look up what they are to compute.
    """
    parser.add_argument(
        "--repeats", type=positive, default=3, help="timed runs, after one that warms up [3]"
    )
    add_engine_arguments(parser, skip_tokenizer_init=True, enable_prefix_caching=False)


@dataclass(frozen=True)
class EngineRun:
    """Which model ran where."""

    path: Path
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype

    @classmethod
    def of(cls, llm: LLM) -> EngineRun:
        runner = llm.engine.runner
        return cls(
            runner.model_path,
            runner.model_config,
            runner.device,
            runner.dtype,
            runner.cache_dtype,
        )

    def roofline(self) -> Roofline:
        """Measures the device's ceilings: call it when the engine has given its memory back."""
        from nano_vllm.bench.roofline import Roofline

        return Roofline.measure(self.config, self.dtype, self.cache_dtype, self.device)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe(self, roofline: Roofline) -> dict[str, Any]:
        """The head of a report."""
        from nano_vllm.bench.report import describe_machine

        return {
            **describe_machine(self.device.type),
            "model": self.path.name,
            "dtype": self.dtype_name,
            **roofline.ceilings(),
        }
