"""What the ranks of the tests do; imported once for all of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nano_vllm.runner.model_runner  # noqa: F401  (torch and all else, once for all ranks)
from nano_vllm import LLM, SamplingParams, serve
from nano_vllm.bench import __main__ as bench
from nano_vllm.distributed import process_groups, watchdog
from nano_vllm.outputs import RequestOutput
from nano_vllm.runner import model_worker
from nano_vllm.runner.follower import Follower
from nano_vllm.runner.model_worker import ModelWorker
from nano_vllm.runner.step_message import Step
from nano_vllm.sampling import gathering

VOCAB_SIZE = 199


def options_of(path: str, **options: Any) -> dict[str, Any]:
    """Of an engine whose pool is small: sequences are cut in chunks, preempted and found again."""
    settings = {
        "model": path,
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "num_blocks": 16,
        "host_cache_memory": 200_000,
        "block_size": 8,
        "max_num_batched_tokens": 24,
        "max_model_len": 80,
        "max_num_seqs": 6,
    }
    return settings | options


def generate_all(folder: Path, options: dict[str, Any], seed: int) -> None:
    """A mix of requests, some of which are aborted; results go into a file."""
    torch.set_num_threads(1)
    _note_steps(folder)
    model_worker.LEAST_SKIPPED_TOKENS = 1  # the prompts are short
    draw = random.Random(seed)
    shared = [draw.randrange(3, VOCAB_SIZE) for _ in range(20)]
    with LLM(**options) as llm:
        engine = llm.engine
        engine.scheduler.admission.horizon = 0  # who is admitted may have to leave again
        engine.scheduler.admission.host_block_seconds = (
            None  # what is in host memory comes back from there
        )
        results: dict[str, Any] = {}
        for number in range(14):
            prompt = shared[: draw.choice((0, 9, 20))]
            prompt = prompt + [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 30))]
            engine.add_request(str(number), prompt, _params(draw, number))
        for step in range(10_000):
            if not engine.has_work:
                break
            if step == 6:
                engine.abort("3")
            for output in engine.step():
                results[output.request_id] = [
                    [c.token_ids, _numbers(c.logprobs), c.finish_reason] for c in output.outputs
                ] + [_numbers(output.prompt_logprobs)]
        # All alike: chosen where the logits are.
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        prompts = [[draw.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (3, 30, 11)]
        for output in llm.generate(prompts, greedy, use_tqdm=False):
            results[f"greedy {output.request_id}"] = output.outputs[0].token_ids
        results["candidates"] = [
            output.outputs[0].token_ids for output in _generate_with_top_k(llm, prompts, folder)
        ]
        metrics = llm.get_metrics()
        results["preemptions"] = metrics.num_preemptions > 0
        results["cached"] = metrics.num_cached_tokens > 0
        results["loaded"] = metrics.num_loaded_tokens > 0
        results["free"] = metrics.num_free_blocks
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def _note_steps(folder: Path) -> None:
    """What a rank makes of each step goes into a file: what it reads and moves, block tables
    included; and which tokens it takes from the step before.
    """
    prepare = ModelWorker.prepare
    lines = (folder / f"steps.{os.environ['RANK']}").open("w", encoding="utf-8", buffering=1)

    def noted(worker: ModelWorker, step: Step, begin: Callable[[], None] | None = None) -> Any:
        inputs = prepare(worker, step, begin)
        attention = inputs.attention
        read = (
            *(inputs.input_ids, inputs.positions, attention.slot_mapping, attention.block_tables),
            *(attention.query_start_loc, attention.seq_lens),
        )
        moved = step.block_copies, step.swap_outs, step.swap_ins
        text = repr((*map(int, step.staged), moved, [tensor.tolist() for tensor in read]))
        lines.write(f"{zlib.crc32(text.encode())} {worker._token_ids.tolist()}\n")
        return inputs

    ModelWorker.prepare = noted  # type: ignore[method-assign]


TOP_K = 20


def _generate_with_top_k(llm: LLM, prompts: list[list[int]], folder: Path) -> list[RequestOutput]:
    """Chosen from candidates. The bytes of a row that the first rank sent go into a file."""
    gathering.FEW_BYTES = 0
    ranks, sent = llm.engine.runner.parallel.tp, set()
    gather_columns = ranks.gather_columns

    def watched(x: torch.Tensor, num_columns: int) -> torch.Tensor | None:
        sent.add(x[0].nbytes)
        return gather_columns(x, num_columns)

    ranks.gather_columns = watched  # type: ignore[method-assign]
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.2, top_k=3, seed=1, max_tokens=12, ignore_eos=True),
        SamplingParams(top_k=TOP_K, top_p=0.9, min_p=0.01, max_tokens=12, ignore_eos=True),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ranks.gather_columns = gather_columns  # type: ignore[method-assign]
    (folder / "sent.json").write_text(json.dumps(sorted(sent)), encoding="utf-8")
    return outputs


def _params(draw: random.Random, number: int) -> SamplingParams:
    return SamplingParams(
        temperature=draw.choice((0.0, 0.7, 1.2)),
        top_p=draw.choice((1.0, 0.9)),
        seed=draw.choice((None, number)),
        n=draw.choice((1, 1, 2)),
        max_tokens=draw.randint(10, 30),
        presence_penalty=draw.choice((0.0, 0.5)),
        logprobs=draw.choice((None, None, 2)),
        prompt_logprobs=draw.choice((None, None, 1)),
        ignore_eos=True,
    )


def _numbers(entries: Any) -> Any:
    if entries is None:
        return None
    return [entry and {token: found.logprob for token, found in entry.items()} for entry in entries]


def bench_throughput(folder: Path, options: dict[str, Any]) -> None:
    """What it prints goes into a file."""
    torch.set_num_threads(1)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    lengths = ["--num-prompts=8", "--input-len=5", "--output-len=9", "--repeats=1"]
    path = folder / f"out.{os.environ['RANK']}"
    with path.open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        assert bench.main(["throughput", *lengths, *flags]) == 0


def generate_slowly(folder: Path, options: dict[str, Any]) -> None:
    """Steps without end, whose number goes into a file."""
    torch.set_num_threads(1)
    with LLM(**options) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        step = 0
        while True:
            llm.engine.add_request(str(step), [5, 6, 7], greedy)
            while llm.engine.has_work:
                llm.engine.step()
                step += 1
                (folder / "step").write_text(str(step))


def _in_step_of_followers(number: int, action: Callable[[], None]) -> None:
    execute, count = Follower._execute, itertools.count()

    def changed(follower: Follower, step: Step) -> None:
        if next(count) == number:
            action()
        execute(follower, step)

    Follower._execute = changed  # type: ignore[method-assign]


def fail_in_a_step(folder: Path, options: dict[str, Any]) -> None:
    def fail() -> None:
        raise OSError("no more")

    _in_step_of_followers(7, fail)
    generate_slowly(folder, options)


def hang_in_a_step(folder: Path, options: dict[str, Any]) -> None:
    _in_step_of_followers(7, lambda: time.sleep(1000))
    generate_slowly(folder, options)


def generate_with_own_seeds(folder: Path, options: dict[str, Any]) -> None:
    generate_slowly(folder, options | {"seed": int(os.environ["RANK"])})


def generate_with_own_weights(folder: Path, options: dict[str, Any]) -> None:
    """Each rank has a folder of its own."""
    generate_slowly(folder, options | {"model": options["model"].format(**os.environ)})


def generate_all_on_hosts_of_their_own(folder: Path, options: dict[str, Any], seed: int) -> None:
    """The ranks cannot see each other's processes, nor share memory."""
    process_groups.process_space = watchdog.process_space = lambda: os.environ["RANK"]
    generate_all(folder, options, seed)


def serve_ids(folder: Path, options: list[str]) -> None:
    """The server, of token ids."""
    sys.exit(serve.main(options))


if __name__ == "__main__":  # under torchrun
    generate_all_on_hosts_of_their_own(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
