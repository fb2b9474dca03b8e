"""The host's work for a step by part: all that the engine does but the model and its sampling.

On a CPU the block tables, which a GPU would expand, are the host's work too: `tables`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nano_vllm.batch import Batch
    from nano_vllm.engine.engine import Engine

PARTS = ("schedule", "prepare", "tables", "update", "report")
CASES = ("steady", "ends", "turnover")
BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
MAX_BATCHED_TOKENS = 8192
VOCAB_SIZE = 10_000
EOS = VOCAB_SIZE - 1
STEPS_PER_END = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nano_vllm.bench.workload import positive

    parser.add_argument("--num-seqs", type=positive, nargs="+", default=[256, 2048], metavar="N")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help=f"steady: none ends; ends: one in {STEPS_PER_END} steps; turnover: another comes in "
        f"its place [all]",
    )
    parser.add_argument("--steps", type=positive, default=100, help="timed steps of a run [100]")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of a case [3]")


def run(args: argparse.Namespace) -> None:
    import torch

    from nano_vllm.bench.report import describe_machine, report

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others would wait for work in the way of the host
    rows = []
    for num_seqs in args.num_seqs:
        for case in args.cases:
            for ahead in (False, True):
                runs = [time_steps(num_seqs, case, ahead, args.steps) for _ in range(args.repeats)]
                laps = [lap for run in runs for lap in run]
                rows.append({"seqs": num_seqs, "case": case, "ahead": ahead, **summary(laps)})
    report("host", describe_machine("cpu"), rows)
    torch.set_num_threads(threads)


def summary(laps: list[dict[str, float]]) -> dict[str, float]:
    """Microseconds of a step: medians by part; median, nine in ten and least of what a launch waits
    for, scheduling and preparation; median of the whole.
    """
    launch = sorted(lap["schedule"] + lap["prepare"] for lap in laps if lap["prepare"])
    return {
        **{f"{part} us": 1e6 * statistics.median(lap[part] for lap in laps) for part in PARTS},
        "to launch us": 1e6 * statistics.median(launch),
        "p90 us": 1e6 * launch[len(launch) * 9 // 10],
        "least us": 1e6 * launch[0],
        "step us": 1e6 * statistics.median(lap["step"] for lap in laps),
    }


def time_steps(num_seqs: int, case: str, ahead: bool, steps: int) -> list[dict[str, float]]:
    """Seconds of each step by part; `step` has what else `Engine.step` does as well."""
    from nano_vllm.config import EngineConfig
    from nano_vllm.engine.engine import Engine

    draw = random.Random(0)
    runner = ModelLessRunner(num_seqs, ahead, draw)
    engine = Engine(EngineConfig(max_num_seqs=num_seqs), runner)  # type: ignore[arg-type]
    for number in range(num_seqs):
        add_request(engine, str(number), draw)
    while len(engine.scheduler.running) < num_seqs:
        engine.step()
    for _ in range(BLOCK_SIZE):
        engine.step()

    lap: dict[str, float] = {}
    scheduler = engine.scheduler
    for owner, method, part in (
        (scheduler, "schedule", "schedule"),
        (scheduler, "schedule_ahead", "schedule"),
        (runner, "launch", "prepare"),
        (runner.input_batch, "_expand_tables", "tables"),
        (scheduler, "update", "update"),
        (engine, "_reported", "report"),
        (runner, "draw_tokens", "model"),
    ):
        time_calls(owner, method, lap, part)
    laps = []
    for number in range(steps):
        runner.ends = case != "steady" and number % STEPS_PER_END == 0
        lap.update(dict.fromkeys((*PARTS, "model"), 0.0))
        start = time.perf_counter()
        outputs = engine.step()
        lap["step"] = time.perf_counter() - start - lap["model"] - lap["tables"]
        lap["prepare"] -= lap["tables"]
        laps.append(dict(lap))
        if case == "turnover":
            for output in outputs:
                add_request(engine, f"behind {output.request_id}", draw)
    engine.close()
    return laps


def add_request(engine: Engine, name: str, draw: random.Random) -> None:
    """Prompts of all lengths, so that in each step some sequence comes to the end of a block."""
    from nano_vllm.sampling_params import SamplingParams

    prompt = draw.choices(range(VOCAB_SIZE - 1), k=draw.randint(100, 500))
    engine.add_request(name, prompt, SamplingParams(max_tokens=None))


def time_calls(owner: object, method: str, lap: dict[str, float], part: str) -> None:
    """Have the calls of a method add their seconds to a part of the lap."""
    call = getattr(owner, method)

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        lap[part] += time.perf_counter() - start
        return result

    setattr(owner, method, timed)


class ModelLessRunner:
    """Prepares batches, as for CUDA graphs, then draws the tokens from a hat.

    Args:
        num_seqs: sequences of a step at the most.
        ahead: whether steps may be launched before the tokens of the one before are known.
        draw: the hat.
    """

    def __init__(self, num_seqs: int, ahead: bool, draw: random.Random) -> None:
        import torch

        from nano_vllm.runner.cuda_graphs import StepGraphs
        from nano_vllm.runner.input_batch import InputBatch

        heads = SimpleNamespace(num_kv_heads=8, head_dim=128)
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        self.block_size = BLOCK_SIZE
        self.max_model_len = MAX_MODEL_LEN
        self.max_num_batched_tokens = MAX_BATCHED_TOKENS
        max_blocks_per_seq = MAX_MODEL_LEN // BLOCK_SIZE
        self.num_blocks = num_seqs * max_blocks_per_seq
        self.num_host_blocks = 0
        self.host_block_seconds = None
        self.saturating_tokens = 1
        self.spread = None
        self.padded_tokens = ()
        self.freed_window = 0
        self.input_batch = InputBatch(
            heads,  # type: ignore[arg-type]
            MAX_BATCHED_TOKENS,
            num_seqs,
            max_blocks_per_seq,
            BLOCK_SIZE,
            torch.device("cpu"),
            shares_prefixes=True,
        )
        self._graphs = StepGraphs(MAX_BATCHED_TOKENS, num_seqs)
        self.ends = False
        """Whether one sequence of the next step ends."""
        self.runs_ahead = ahead
        self._draw = draw

    def launch(self, batch: Batch) -> SimpleNamespace:
        rows = self.input_batch.prompt_rows(batch)
        padding = self._graphs.padding_for(batch, batch.num_decodes + len(rows))
        self.input_batch.load(self.input_batch.write(batch, rows, padding))
        return SimpleNamespace(result=lambda: self.draw_tokens(batch))

    def draw_tokens(self, batch: Batch) -> Any:
        from nano_vllm.batch import StepResult

        ids = self._draw.choices(range(EOS), k=len(batch.scheduled))
        if self.ends:
            ids[self._draw.randrange(len(ids))] = EOS
        return StepResult(ids)

    def prepare_graph(self) -> bool:
        return False

    def close(self) -> None:
        pass
