"""Command line of the benchmarks."""

from __future__ import annotations

import importlib
import sys

from nano_vllm.cli import ArgumentParser, run_command

BENCHMARKS = {
    "throughput": "output tokens per second over many requests, against peers",
    "latency": "time to the first token and time per output token, by batch size",
    "prefill": "prompt tokens per second and TFLOP/s over long prompts",
    "prefix": "what the prefix cache saves of prompts that begin alike",
    "pace": "time between the tokens of streams while a long prompt is computed",
    "startup": "seconds from the start of a process to its first token, by part",
    "host": "microseconds of a step beside the model: scheduling, preparation, taking tokens in",
    "serve": "times to tokens and goodput of an OpenAI server under load",
    "replay": "what an engine with --record scheduled, decided again without a model, and drawn",
    "all_reduce": "microseconds of sums over GPUs by size, in each way, under torchrun",
    "kernels": "GB/s and TFLOP/s of the kernels, against the device's ceilings and torch",
}


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, 2 for bad usage, or 1 if the work failed."""
    parser = ArgumentParser(prog="python -m nano_vllm.bench", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, purpose in BENCHMARKS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        importlib.import_module(f"nano_vllm.bench.{name}").add_arguments(command)
    args = parser.parse_args(argv)
    benchmark = importlib.import_module(f"nano_vllm.bench.{args.benchmark}")
    return run_command(lambda: benchmark.run(args) or 0, args.debug)


if __name__ == "__main__":
    sys.exit(main())
