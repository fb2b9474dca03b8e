"""Time to the first token and time per output token, by batch size, greedy."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.cli import add_engine_arguments

    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens of each request")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens of each request")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.bench.workload import Workload
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    if args.output_len < 2:
        raise ValueError(f"--output-len must be at least 2, got {args.output_len}")
    rows: list[dict[str, Any]] = []
    with LLM(**engine_options(args)) as llm:
        runner = llm.engine.runner
        for batch in args.batch_sizes:
            workload = Workload.random(
                batch, args.input_len, args.output_len, runner.model_config.vocab_size, args.seed
            )
            first = workload.with_output_len(1).measure_llm(llm, 0.0)["wall s"]
            whole = workload.measure_llm(llm, 0.0)["wall s"]
            rows.append(
                {
                    "batch": batch,
                    "first token ms": first * 1e3,
                    "ms per output token": (whole - first) / (args.output_len - 1) * 1e3,
                    "output tok/s": batch * args.output_len / whole,
                }
            )
        machine = describe_machine(runner.device.type)
        machine |= {
            "model": runner.model_path.name,
            "input": args.input_len,
            "output": args.output_len,
        }
    report("latency", machine, rows)
