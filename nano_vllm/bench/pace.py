"""The pace of running streams while the prompt of another request is computed."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nano_vllm.engine.engine import Engine

LONG = "long"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.workload import positive
    from nano_vllm.cli import add_engine_arguments

    parser.add_argument(
        "--num-streams", type=positive, nargs="+", default=[1, 8, 32], metavar="N", help="[1 8 32]"
    )
    parser.add_argument(
        "--context", type=positive, default=512, help="prompt tokens of each stream [512]"
    )
    parser.add_argument(
        "--input-len", type=positive, default=32_000, help="tokens of the long prompt [32000]"
    )
    parser.add_argument(
        "--idle-tokens", type=positive, default=200, help="of each stream ahead of it [200]"
    )
    add_engine_arguments(parser, skip_tokenizer_init=True, enable_prefix_caching=False)


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.engine_run import EngineRun
    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.cli import engine_options
    from nano_vllm.engine.llm import LLM

    with LLM(**engine_options(args)) as llm:
        run_ = EngineRun.of(llm)
        while llm.engine.prepare_graph():  # as a server does that nobody asks for anything
            pass
        rows = []
        for num_streams in args.num_streams:
            for is_timed in (False, True):  # the first one fits the costs
                row = measure(llm.engine, num_streams, args)
                if is_timed:
                    rows.append(row)
    machine = {
        **describe_machine(run_.device.type),
        "model": run_.path.name,
        "dtype": run_.dtype_name,
    }
    report("pace", machine, rows)


def measure(engine: Engine, num_streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds between the tokens of all streams, without the long prompt and beside it."""
    from nano_vllm.bench.workload import Workload
    from nano_vllm.sampling_params import SamplingParams

    vocab_size = engine.runner.model_config.vocab_size
    draw = Workload.random(num_streams, (args.context,) * 2, (1, 1), vocab_size, args.seed)
    (long_prompt,) = Workload.random(
        1, (args.input_len,) * 2, (1, 1), vocab_size, args.seed + 1
    ).prompts
    endless = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0.0, detokenize=False)
    for place, prompt in enumerate(draw.prompts):
        engine.add_request(str(place), prompt, endless, stream=True)
    idle: dict[str, list[float]] = defaultdict(list)
    beside: dict[str, list[float]] = defaultdict(list)
    while len(idle) < num_streams:
        note_step(engine, idle)
    idle.clear()  # of some streams beside the prompts of the others
    while len(idle) < num_streams or min(map(len, idle.values())) < args.idle_tokens:
        note_step(engine, idle)
    start = time.perf_counter()
    engine.add_request(LONG, long_prompt, SamplingParams(max_tokens=1, detokenize=False))
    for name, times in idle.items():
        beside[name].append(times[-1])
    while not note_step(engine, beside):
        pass
    first_token = time.perf_counter() - start
    for name in idle:
        engine.abort(name)
    before, during = gaps(idle), gaps(beside)
    return {
        "streams": num_streams,
        "idle p50 ms": before[len(before) // 2],
        "idle p99 ms": before[len(before) * 99 // 100],
        "beside p50 ms": during[len(during) // 2],
        "beside p99 ms": during[len(during) * 99 // 100],
        "beside max ms": during[-1],
        "p99 / idle p99": during[len(during) * 99 // 100] / before[len(before) * 99 // 100],
        "first token ms": 1e3 * first_token,
        "prompt tok/s": args.input_len / first_token,
    }


def note_step(engine: Engine, times: dict[str, list[float]]) -> bool:
    """Take a step and note when each stream got its token; whether the long request has ended."""
    outputs = engine.step()
    now = time.perf_counter()
    for output in outputs:
        if output.request_id != LONG:
            times[output.request_id].append(now)
    return any(output.request_id == LONG for output in outputs)


def gaps(times: dict[str, list[float]]) -> list[float]:
    """Milliseconds between one token and the next of the same stream, rising."""
    return sorted(
        1e3 * (later - earlier)
        for of_stream in times.values()
        for earlier, later in pairwise(of_stream)
    )
