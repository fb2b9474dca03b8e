"""Output tokens per second over many requests of random tokens, against the peers that are
installed.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

PEERS = ("transformers", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.engine_run import add_run_arguments
    from nano_vllm.bench.workload import length_range, positive

    parser.add_argument("--num-prompts", type=positive, default=256, help="requests [256]")
    for name, what in (("--input-len", "prompt"), ("--output-len", "output")):
        parser.add_argument(
            name,
            type=length_range,
            default="100-1024",
            metavar="N|FROM-TO",
            help=f"{what} tokens of a request, drawn uniformly [100-1024]",
        )
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy [0.6]")
    parser.add_argument(
        "--peer",
        action="append",
        choices=PEERS,
        default=[],
        help="run this one too, greedy; repeatable",
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench import peers
    from nano_vllm.bench.engine_run import EngineRun, check_files, write_files
    from nano_vllm.bench.report import report
    from nano_vllm.bench.roofline import share
    from nano_vllm.bench.step_report import (
        RecordedRun,
        idle_share,
        rows_by_kind,
        tables,
        timed_steps,
    )
    from nano_vllm.bench.workload import Workload
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    _check_peers(args)
    check_files(args)
    with LLM(**engine_options(args)) as llm:
        engine = EngineRun.of(llm)
        workload = Workload.random(
            args.num_prompts,
            args.input_len,
            args.output_len,
            engine.config.vocab_size,
            args.seed,
        )
        wall = statistics.median(workload.time_llm(llm, args.temperature, args.repeats))
        steps = timed_steps(workload.record(llm, args.temperature))
    roofline = engine.roofline()
    prefill, decode = roofline.prefill_seconds(workload), roofline.decode_seconds(workload)
    floor = None if prefill is None or decode is None else prefill + decode
    ours = {"floor s": floor, "floor / wall": share(floor, wall)}
    if engine.num_stages > 1:
        ours["bubble"] = idle_share(steps)
    rows: list[dict[str, Any]] = [
        {"engine": "nano_vllm", "dtype": engine.dtype_name} | workload.figures(wall) | ours
    ]
    for peer in args.peer:
        found = peers.measure(peer, engine.path, engine.device.type, workload, args.repeats)
        rows += [row | dict.fromkeys(ours) for row in found]
    machine = engine.describe(roofline) | {
        "prompts": args.num_prompts,
        "input": workload.input_tokens,
        "output": workload.output_tokens,
        "temperature": args.temperature,
    }
    report("throughput", machine, rows, more=tables(rows_by_kind(steps, roofline)))
    write_files(args, machine, [RecordedRun("throughput", steps)], roofline)


def _check_peers(args: argparse.Namespace) -> None:
    if args.peer and args.load_format == "dummy":
        raise ValueError("--peer needs a model with weights, got --load-format dummy")
    if "transformers" in args.peer and any(
        low != high for low, high in (args.input_len, args.output_len)
    ):
        raise ValueError(
            "the peer transformers runs one static batch: give --input-len and --output-len one "
            "number each"
        )
