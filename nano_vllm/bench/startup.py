"""Seconds from the start of a process to its first token, and what they go into."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.workload import positive
    from nano_vllm.cli import add_engine_arguments

    parser.add_argument(
        "--input-len", type=positive, default=128, help="prompt tokens of the one request [128]"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="processes [3]")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.cli import engine_options

    options = engine_options(args)
    # a model of dummy weights may well have no tokenizer either
    options["skip_tokenizer_init"] |= args.load_format == "dummy"
    rows: list[dict[str, Any]] = []
    for number in range(args.repeats):
        result = _run_child(options, args.input_len)
        rows.append({"run": number + 1, **result["seconds"]})
    described = {
        "model": result["model"],
        "dtype": result["dtype"],
        "input": args.input_len,
        "tokenizer": not options["skip_tokenizer_init"],
        "unit": "s",
    }
    report("startup", describe_machine(result["device"]) | described, rows)


def _run_child(options: dict[str, Any], input_len: int) -> dict[str, Any]:
    """What `startup_child` found; what it raised as ValueError."""
    # the monotonic clock is the system's, the same in all processes
    request = {"start": time.monotonic(), "options": options, "input_len": input_len}
    child = subprocess.run(
        [sys.executable, "-m", "nano_vllm.bench.startup_child", json.dumps(request)],
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        lines = child.stderr.splitlines() or [f"the process ended with {child.returncode}"]
        raise ValueError(lines[-1].removeprefix("error: "))
    return json.loads(child.stdout.splitlines()[-1])
