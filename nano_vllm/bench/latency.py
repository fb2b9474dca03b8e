"""Time to the first token and time per output token, by batch size, greedy."""

from __future__ import annotations

import argparse
import statistics
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.engine_run import add_run_arguments
    from nano_vllm.bench.workload import positive

    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 8, 32, 128], metavar="N"
    )
    parser.add_argument(
        "--input-len", type=positive, default=128, help="prompt tokens of each request [128]"
    )
    parser.add_argument(
        "--output-len", type=positive, default=256, help="output tokens of each request [256]"
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.engine_run import EngineRun, check_files, write_files
    from nano_vllm.bench.report import report
    from nano_vllm.bench.roofline import share
    from nano_vllm.bench.step_report import (
        RecordedRun,
        figures,
        steady_decode,
        tables,
        timed_steps,
    )
    from nano_vllm.bench.workload import Workload
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    if args.output_len < 2:
        raise ValueError(f"--output-len must be at least 2, got {args.output_len}")
    check_files(args)
    input_len, output_len = (args.input_len,) * 2, (args.output_len,) * 2
    times = []
    runs = []
    with LLM(**engine_options(args)) as llm:
        engine = EngineRun.of(llm)
        for batch in args.batch_sizes:
            workload = Workload.random(
                batch, input_len, output_len, engine.config.vocab_size, args.seed
            )
            first = workload.with_output_len(1).time_llm(llm, 0.0, args.repeats)
            whole = workload.time_llm(llm, 0.0, args.repeats)
            times.append((workload, statistics.median(first), whole))
            runs.append(RecordedRun(f"batch {batch}", timed_steps(workload.record(llm, 0.0))))
    roofline = engine.roofline()
    steps = args.output_len - 1
    rows: list[dict[str, Any]] = []
    for workload, first_token, whole in times:
        wall = statistics.median(whole)
        per_token = (wall - first_token) / steps
        decode = roofline.decode_seconds(workload)
        rows.append(
            {
                "batch": len(workload.prompts),
                "first token ms": first_token * 1e3,
                "TPOT ms": per_token * 1e3,
                "spread ms": (max(whole) - min(whole)) / steps * 1e3,
                "output tok/s": workload.output_tokens / wall,
                "floor ms": None if decode is None else decode / steps * 1e3,
                "MBU": share(decode, per_token * steps),
            }
        )
    machine = engine.describe(roofline) | {"input": args.input_len, "output": args.output_len}
    steady = [
        {"batch": batch} | figures(decodes, roofline)
        for batch, run in zip(args.batch_sizes, runs, strict=True)
        if (decodes := steady_decode(run.steps))
    ]
    report("latency", machine, rows, more=tables(steady))
    write_files(args, machine, runs, roofline)
