"""What a model needs of GPUs, by tensor and pipeline parallel size: memory, communication, how many
sequences fit; with --simulate, step times. From its configuration alone, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from nano_vllm.cli import (
    FAILURE,
    ArgumentParser,
    add_field_arguments,
    check_plot,
    print_table,
    run_command,
)
from nano_vllm.config import EngineConfig
from nano_vllm.gpus import GPUS, find_gpu
from nano_vllm.plan import tables
from nano_vllm.plan.fit import Fit, fit, layouts
from nano_vllm.plan.plot import write_plot
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.plan.simulate import Simulation

OPTIONS = (
    "dtype",
    "kv_cache_dtype",
    "gpu_memory_utilization",
    "kv_cache_memory",
    "num_blocks",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "enforce_eager",
)
"""Of the engine, those that memory depends on."""
SWEPT_GPUS = 16
"""Of the layouts that are looked at where none is given."""
MAX_GPUS = 1024
SIMULATED_CONTEXT = 4096
LARGEST = 1 << 20


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0, 1 where nothing fits or the model cannot be read, 2 for bad usage."""
    parser = ArgumentParser(prog="python -m nano_vllm.plan", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        config = EngineConfig.from_options({n: getattr(args, n) for n in ("model", *OPTIONS)})
        gpu = find_gpu(args.gpu, args.gpu_memory)
        if args.plot is not None:
            check_plot(args.plot)
            if not args.simulate:
                raise ValueError("--plot needs --simulate")
        if not args.max_tpot > 0:
            raise ValueError(f"max_tpot must be milliseconds, more than 0, got {args.max_tpot!r}")
    except ValueError as error:
        parser.error(str(error))
    return run_command(lambda: run(args, Setup.read(config, gpu, args.gpus_per_host)), args.debug)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder, a .gguf file, a hub id (its configuration is fetched, no "
        "weights), or qwen3-0.6b, qwen3-8b, llama-3.2-1b, llama-3.1-8b",
    )
    parser.add_argument(
        "--tp", type=_count, metavar="N", help="tensor parallel size [all that divide]"
    )
    parser.add_argument(
        "--pp", type=_count, metavar="N", help="pipeline parallel size [powers of two]"
    )
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} [h100]")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of another kind of GPU")
    parser.add_argument("--gpus-per-host", type=_count, default=8, metavar="N", help="[8]")
    parser.add_argument(
        "--context",
        type=_count,
        metavar="N",
        help=f"tokens of a sequence; the longest possible, of a simulation {SIMULATED_CONTEXT}",
    )
    parser.add_argument(
        "--concurrency", type=_count, default=1, metavar="N", help="sequences to hold at once [1]"
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as one line")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    group = parser.add_argument_group("simulation")
    group.add_argument("--simulate", action="store_true", help="step times, by a model of them")
    group.add_argument(
        "--max-gpus", type=_count, default=MAX_GPUS, metavar="N", help=f"[{MAX_GPUS}]"
    )
    group.add_argument(
        "--max-tpot", type=float, default=50.0, metavar="MS", help="time per output token [50]"
    )
    group.add_argument(
        "--plot",
        metavar="FILE",
        help="draw what a sequence gets against what a GPU gives: .png, .svg or .pdf",
    )
    add_field_arguments(parser.add_argument_group("engine"), EngineConfig, OPTIONS)


def run(args: argparse.Namespace, setup: Setup) -> int:
    """Print the plan."""
    longest = setup.max_model_len
    context = args.context or (min(longest, SIMULATED_CONTEXT) if args.simulate else longest)
    if context > longest:
        raise ValueError(f"context must be at most {longest}, got {context}")
    chosen = _chosen(args, setup)
    fits = [fit(setup, layout, context, args.concurrency) for layout in chosen]
    if args.simulate:
        plan = _simulate(args, setup, context, chosen)
    else:
        plan = {
            "memory": tables.fits_json(fits),
            "communication": tables.communication_json(setup, chosen),
        }
    if args.json:
        described = {"model": setup.config.model, "gpu": setup.gpu.name, "context": context}
        print(json.dumps({**described, **plan}))
    else:
        print(tables.heading(setup, context, args.concurrency))
        if args.simulate:
            _print_simulation(plan)
        else:
            _print_fits(setup, fits)
        print(f"\n{tables.verdict(fits)}")
    return 0 if any(found.fits for found in fits) else FAILURE


def _chosen(args: argparse.Namespace, setup: Setup) -> list[Layout]:
    """The layouts asked for: one, or all that have the size that is given."""
    if args.tp and args.pp:
        return [Layout(args.tp, args.pp)]
    if args.tp:
        pps = sorted({layout.pp for layout in layouts(setup, SWEPT_GPUS)})
        return [Layout(args.tp, pp) for pp in pps if args.tp * pp <= max(args.tp, SWEPT_GPUS)]
    if args.pp:
        limit = max(args.pp, SWEPT_GPUS)
        tps = sorted({layout.tp for layout in layouts(setup, SWEPT_GPUS)})
        return [Layout(tp, args.pp) for tp in tps if tp * args.pp <= limit]
    return list(layouts(setup, SWEPT_GPUS))


def _print_fits(setup: Setup, fits: list[Fit]) -> None:
    print("\nGiB on the fullest GPU, and what its KV blocks hold")
    print_table(tables.memory_rows(setup, fits))
    print("\ncommunication of a step, in the sum of its stages, for each GPU of a stage")
    print_table(tables.communication_rows(setup, [found.layout for found in fits]))


def _simulate(
    args: argparse.Namespace, setup: Setup, context: int, chosen: list[Layout]
) -> dict[str, Any]:
    simulation = Simulation(setup, context, args.max_gpus)
    if args.plot is not None:
        write_plot(args.plot, simulation, chosen)
    sizes = [1 << i for i in range(args.max_gpus.bit_length())]
    limit = args.max_tpot / 1e3
    return {
        "assumptions": tables.assumptions(setup),
        "ms per output token, by batch": tables.step_rows(simulation, chosen),
        "prompt tokens/s": tables.prefill_rows(simulation, chosen),
        f"clusters, at most {args.max_tpot:g} ms per output token": [
            tables.cluster_row(n, simulation.best(n, limit), simulation.quickest(n)) for n in sizes
        ],
    }


def _print_simulation(plan: dict[str, Any]) -> None:
    for name, rows in plan.items():
        print(f"\n{name}")
        if name == "assumptions":
            print("\n".join(f"- {line}" for line in rows))
        elif rows:
            print_table(rows)


def _count(text: str) -> int:
    """A number of 1 or more."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be an integer in [1, {LARGEST}], got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
