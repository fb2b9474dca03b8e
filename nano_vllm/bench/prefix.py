"""What the prefix cache saves: many prompts that begin alike, against as many that do not."""

from __future__ import annotations

import argparse
import statistics
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.workload import length_range, positive
    from nano_vllm.cli import add_engine_arguments

    parser.add_argument("--num-prompts", type=positive, default=256, help="requests [256]")
    parser.add_argument(
        "--prefix-len",
        type=positive,
        default=2048,
        help="tokens that prompts have in common [2048]",
    )
    parser.add_argument(
        "--suffix-len",
        type=length_range,
        default=(16, 64),
        metavar="N|FROM-TO",
        help="tokens of its own that each prompt has behind them [16-64]",
    )
    parser.add_argument("--repeats", type=positive, default=3, help="runs, after one [3]")
    add_engine_arguments(parser, skip_tokenizer_init=True)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.engine_run import EngineRun
    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.bench.workload import Workload
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    with LLM(**engine_options(args)) as llm:
        engine = EngineRun.of(llm)
        if not llm.engine.config.enable_prefix_caching:
            raise ValueError("bench prefix needs enable_prefix_caching")
        rows: list[dict[str, Any]] = []
        vocab_size = engine.config.vocab_size
        for repeat in range(args.repeats + 1):
            seed = args.seed + 3 * repeat
            prefixes, own = (
                Workload.random(args.num_prompts, lengths, (1, 1), vocab_size, seed + place)
                for place, lengths in enumerate(((args.prefix_len,) * 2, args.suffix_len))
            )
            apart = [a + b for a, b in zip(prefixes.prompts, own.prompts, strict=True)]
            # Another prefix than any of those, so that the first of the run has to compute it.
            head = Workload.random(1, (args.prefix_len,) * 2, (1, 1), vocab_size, seed + 2)
            alike = [head.prompts[0] + prompt for prompt in own.prompts]
            again = [[*prompt[:-1], 0] for prompt in alike]
            for name, prompts in (("apart", apart), ("alike", alike), ("again", again)):
                before = llm.get_metrics()
                seconds = Workload(prompts, own.output_lens).generate(llm, 0.0)
                after = llm.get_metrics()
                rows.append(
                    {
                        "prompts": name,
                        "wall s": seconds,
                        "cached tokens": after.num_cached_tokens - before.num_cached_tokens,
                        "tokens": sum(map(len, prompts)),
                    }
                )
    timed = rows[3:]
    table = []
    for name in ("apart", "alike", "again"):
        own_rows = [row for row in timed if row["prompts"] == name]
        table.append(
            {
                **own_rows[-1],
                "wall s": statistics.median(row["wall s"] for row in own_rows),
            }
        )
    for row in table:
        row["times as fast"] = table[0]["wall s"] / row["wall s"]
    machine = {
        **describe_machine(engine.device.type),
        "model": engine.path.name,
        "dtype": engine.dtype_name,
    }
    report("prefix", machine, table)
