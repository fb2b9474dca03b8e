"""What the benchmarks of the whole engine have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano_vllm.bench.workload import positive
from nano_vllm.cli import add_engine_arguments, check_plot

if TYPE_CHECKING:
    import torch

    from nano_vllm.bench.roofline import Roofline
    from nano_vllm.bench.step_report import RecordedRun
    from nano_vllm.config import ModelConfig
    from nano_vllm.engine.llm import LLM


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Repeats, files of the recorded run, and the engine's options: token ids need no tokenizer,
    and with a prefix cache the repeats would look up what they are to compute.
    """
    parser.add_argument(
        "--repeats", type=positive, default=3, help="timed runs, after one that warms up [3]"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the steps of a run of their own: .png, .svg or .pdf"
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="write these steps as a trace that ui.perfetto.dev opens"
    )
    add_engine_arguments(parser, skip_tokenizer_init=True, enable_prefix_caching=False)


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError for a file that could not be written once all has run; make the others."""
    if args.plot is not None:
        check_plot(args.plot)
    try:
        for path in filter(None, (args.plot, args.trace)):
            Path(path).open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write: {error}")


def write_files(
    args: argparse.Namespace,
    machine: dict[str, Any],
    runs: Sequence[RecordedRun],
    roofline: Roofline,
) -> None:
    """The files that the arguments ask for; ValueError where one cannot be written."""
    from nano_vllm.bench.step_plot import write_plot
    from nano_vllm.bench.step_trace import write_trace

    try:
        if args.trace is not None:
            write_trace(args.trace, runs)
        if args.plot is not None:
            title = ", ".join(machine[key] for key in ("model", "dtype", "device", "date"))
            write_plot(args.plot, title, runs, roofline)
    except OSError as error:
        raise ValueError(f"cannot write: {error}")


@dataclass(frozen=True)
class EngineRun:
    """Which model ran where."""

    path: Path
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    is_quantized: bool
    tensor_parallel_size: int
    num_stages: int
    layers: range
    """Of the stage whose steps are recorded."""

    @classmethod
    def of(cls, llm: LLM) -> EngineRun:
        runner = llm.engine.runner
        return cls(
            runner.model_path,
            runner.model_config,
            runner.device,
            runner.dtype,
            runner.cache_dtype,
            llm.engine.config.quantization is not None,
            llm.engine.config.tensor_parallel_size,
            llm.engine.config.pipeline_parallel_size,
            runner.stage.layers,
        )

    def roofline(self) -> Roofline:
        """Of one device with its share of the model. Measures its ceilings: call it when the engine
        has given its memory back.
        """
        from nano_vllm.bench.roofline import Roofline

        size = self.tensor_parallel_size
        shard = self.config.shard(size, self.layers)
        share = replace(shard, vocab_size=-(-self.config.vocab_size // size))
        return Roofline.measure(share, self.dtype, self.cache_dtype, self.device, self.is_quantized)

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
            "tensor parallel": self.tensor_parallel_size,
            "pipeline parallel": self.num_stages,
            **roofline.ceilings(),
        }
