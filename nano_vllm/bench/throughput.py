"""Output tokens per second over many requests of random tokens, against the peers that are
installed.
"""

from __future__ import annotations

import argparse
from typing import Any

PEERS = ("transformers", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.cli import add_engine_arguments

    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens of each request")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--peer", action="append", choices=PEERS, default=[], help="run this one too; repeatable"
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench import peers
    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.bench.workload import Workload
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    with LLM(**engine_options(args)) as llm:
        runner = llm.engine.runner
        device, path = runner.device.type, runner.model_path
        workload = Workload.random(
            args.num_prompts,
            args.input_len,
            args.output_len,
            runner.model_config.vocab_size,
            args.seed,
        )
        rows: list[dict[str, Any]] = [
            {"engine": "nano_vllm", "dtype": str(runner.dtype).removeprefix("torch.")}
            | workload.measure_llm(llm, args.temperature)
        ]
    for peer in args.peer:
        rows += peers.measure(peer, path, device, workload)
    machine = describe_machine(device)
    machine |= {
        "model": path.name,
        "prompts": args.num_prompts,
        "input": args.input_len,
        "output": args.output_len,
    }
    report("throughput", machine, rows)
