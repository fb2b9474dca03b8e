"""Prompt tokens per second and TFLOP/s over long prompts with one output token each."""

from __future__ import annotations

import argparse
import statistics
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.engine_run import add_run_arguments
    from nano_vllm.bench.workload import positive

    parser.add_argument("--num-prompts", type=positive, default=16, help="requests [16]")
    parser.add_argument(
        "--input-len", type=positive, default=4096, help="tokens of each prompt [4096]"
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.engine_run import EngineRun, check_files, write_files
    from nano_vllm.bench.report import report
    from nano_vllm.bench.roofline import share
    from nano_vllm.bench.step_report import RecordedRun, rows_by_kind, tables, timed_steps
    from nano_vllm.bench.workload import Workload
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    check_files(args)
    with LLM(**engine_options(args)) as llm:
        engine = EngineRun.of(llm)
        workload = Workload.random(
            args.num_prompts, (args.input_len,) * 2, (1, 1), engine.config.vocab_size, args.seed
        )
        walls = workload.time_llm(llm, 0.0, args.repeats)
        steps = timed_steps(workload.record(llm, 0.0))
    roofline = engine.roofline()
    wall = statistics.median(walls)
    row: dict[str, Any] = {
        "prompts": args.num_prompts,
        "input": args.input_len,
        "prompt tok/s": workload.input_tokens / wall,
        "wall s": wall,
        "spread s": max(walls) - min(walls),
        "TFLOP/s": roofline.prefill_flops(workload) / wall / 1e12,
        "of ceiling": share(roofline.prefill_seconds(workload), wall),
    }
    machine = engine.describe(roofline)
    more = tables(rows_by_kind(steps, roofline))
    report("prefill", machine, [row], more=more)
    write_files(args, machine, [RecordedRun("prefill", steps)], roofline)
