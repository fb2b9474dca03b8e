"""Many clients at once, a fifth of whom leave: nothing leaks, and the others get what is theirs."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

from nano_vllm import LLM, SamplingParams
from tests.server.load_client import Leaving, stream_all
from tests.server.running_server import NUM_BLOCKS, running_server

NUM_REQUESTS = int(os.environ.get("NANO_VLLM_TEST_REQUESTS", "600"))
NUM_CLIENTS = 512
WARM_UP = 256
"""Requests before the first count: what is held from then on is held once."""
LEAVING = 0.2
WORDS = [f" {a}{b}" for a in ("ba", "ki", "lo", "nu") for b in ("d", "mes", "rot", "sa", "x")]
"""Few, as the tokenizer keeps what it made of each: that would grow with the requests."""
RSS_GROWTH = 40_000
"""KiB that a process may gain."""
FD_GROWTH = 2


def test_a_load_with_people_leaving(tiny_model: Path, log_path: Path) -> None:
    draw = random.Random(1)
    bodies = [_body(draw) for _ in range(NUM_REQUESTS)]
    leavings = [Leaving.draw(draw) if draw.random() < LEAVING else None for _ in bodies]
    flags = ["--max-queue", "1024", "--no-access-log"]
    with running_server(tiny_model, log_path, *flags) as server:
        pids = {"server": server.process.pid, "engine": server.engine_pid}
        asyncio.run(stream_all(server.url, bodies[:WARM_UP], NUM_CLIENTS, leavings))
        server.wait_until_idle(60)
        before = {name: _held(pid) for name, pid in pids.items()}
        num_tasks = server.metric("nano_vllm:tasks")
        growth: list[tuple[int, ...]] = []

        def on_end(number: int) -> None:
            if number % 50 == 0:
                growth.append((number, *(_held(pid)[1] for pid in pids.values())))

        texts = asyncio.run(stream_all(server.url, bodies, NUM_CLIENTS, leavings, on_end))
        server.wait_until_idle(60)
        after = {name: _held(pid) for name, pid in pids.items()}
        _print(before, after, growth)
        for name in pids:
            assert after[name][0] <= before[name][0] + FD_GROWTH
            assert after[name][1] <= before[name][1] + RSS_GROWTH
        assert server.metric("nano_vllm:tasks") <= num_tasks
        assert server.metric("nano_vllm:leaked_blocks_total") == 0
        assert sum(server.metrics("nano_vllm:kv_blocks")) == NUM_BLOCKS
    stayed = [i for i, leaving in enumerate(leavings) if leaving is None]
    wrong = _differing(tiny_model, bodies, {i: texts[i] for i in stayed})
    assert not wrong, wrong


def _body(draw: random.Random) -> dict[str, Any]:
    """A prompt of any length, the beginning of which others may have, and an answer of any."""
    words = [draw.choice(WORDS) for _ in range(draw.randint(1, 20))]
    return {
        "prompt": draw.choice(WORDS[:4]) * draw.choice((1, 12)) + "".join(words),
        "max_tokens": draw.randint(1, 60),
        "seed": draw.randrange(2**40),
        "temperature": draw.choice((0.0, 1.0)),
    }


def _differing(
    model: Path, bodies: list[dict[str, Any]], texts: dict[int, str | None]
) -> dict[int, str | None]:
    """Texts that no offline run brings.

    The last bits of a product depend on how many rows it has. Of a draw that falls on the boundary
    of two tokens they decide, about once in a thousand requests: then the batch is another.
    """
    for num_others in (0, 0, 2, 5, 16, 48):
        numbers = sorted({*texts, *range(num_others)})
        offline = _offline(model, [bodies[i] for i in numbers])
        found = dict(zip(numbers, offline, strict=True))
        texts = {i: text for i, text in texts.items() if found[i] != text}
        print(f"other than offline in a batch of {len(numbers)}: {len(texts)}")
        if not texts:
            break
    return texts


def _offline(model: Path, bodies: list[dict[str, Any]]) -> list[str]:
    params = [
        SamplingParams(**{name: value for name, value in body.items() if name != "prompt"})
        for body in bodies
    ]
    with LLM(str(model), device="cpu", num_blocks=NUM_BLOCKS) as llm:
        outputs = llm.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def _held(pid: int) -> tuple[int, int]:
    """File descriptors and KiB of memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = int(status.partition("VmRSS:")[2].split()[0])
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), rss


def _print(before: Any, after: Any, growth: list[tuple[int, ...]]) -> None:
    ended, *sizes = zip(*growth, strict=True)
    for name, size in zip(before, sizes, strict=True):
        slope = np.polyfit(ended, size, 1)[0]
        half = len(ended) // 2
        late = np.polyfit(ended[half:], size[half:], 1)[0]
        print(
            f"{name}: file descriptors {before[name][0]} -> {after[name][0]}, RSS "
            f"{before[name][1]} -> {after[name][1]} KiB, {slope:.3f} KiB a request, "
            f"{late:.3f} in the second half"
        )
