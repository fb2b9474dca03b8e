"""A rank that dies, freezes or fails takes the others along, in bounded time, and is named."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed.launch_ranks import Ranks, start_ranks
from tests.distributed.rank_functions import (
    fail_in_a_step,
    generate_slowly,
    hang_in_a_step,
    options_of,
)
from tests.models.checkpoints import make_checkpoint

DEAD_SECONDS, FROZEN_SECONDS = 10, 30
ROUNDS, AT_ONCE = 20, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder)
    return str(folder)


def check_end(ranks: Ranks, victim: int, seconds: float, line: str) -> None:
    """All ranks but the victim end in time, say so in a line, and leave nothing behind."""
    others = [p for rank, p in enumerate(ranks.processes) if rank != victim]
    end = time.monotonic() + seconds
    for process in others:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in others]
    ranks.kill()
    assert None not in codes, "some have not ended"
    assert 0 not in codes
    for rank in range(len(ranks.processes)):
        if rank != victim:
            assert re.search(line, ranks.errors(rank)), ranks.errors(rank)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", ranks.port))


def strike(model: str, folder: Path, number: int, draw: random.Random, device: str = "cpu") -> None:
    cuts = [(2, 1), (2, 1), (1, 2), (4, 1), (2, 2)]
    if device == "cuda":
        cuts = [(tp, pp) for tp, pp in cuts if tp * pp <= torch.cuda.device_count()]
    tp, pp = draw.choice(cuts)
    size, name = tp * pp, draw.choice((signal.SIGKILL, signal.SIGSTOP))
    victim, step = draw.randrange(size), draw.randint(1, 40)
    options = options_of(model, tensor_parallel_size=tp, pipeline_parallel_size=pp, device=device)
    ranks = start_ranks(generate_slowly, size, folder / str(number), options)
    try:
        ranks.wait_for_step(step)
        pid = ranks.processes[victim].pid
        assert pid is not None
        os.kill(pid, name)
        seconds = DEAD_SECONDS if name == signal.SIGKILL else FROZEN_SECONDS
        check_end(ranks, victim, seconds, rf"error: rank {victim} on .* in step \d+\n")
    finally:
        ranks.kill()


def test_a_rank_is_killed_or_stopped_at_a_random_step(
    tmp_path: Path, model: str, seed: int, device: str
) -> None:
    """On GPUs with NCCL; nothing of the ranks stays there."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    draw = random.Random(seed)
    draws = [random.Random(draw.getrandbits(63)) for _ in range(ROUNDS)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(lambda i: strike(model, tmp_path, i, draws[i], device), range(ROUNDS)))
    if device == "cuda":
        command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert not {int(pid) for pid in found.split() if pid.isdigit()} - {os.getpid()}


@pytest.mark.parametrize(
    ("function", "seconds", "line"),
    [
        (fail_in_a_step, DEAD_SECONDS, r"rank 1 on \S+ failed in step 7: OSError: no more"),
        (hang_in_a_step, FROZEN_SECONDS, r"rank 1 on \S+ is frozen: .*, in step 7"),
    ],
)
def test_a_rank_fails_in_a_step(
    tmp_path: Path, model: str, function: Callable[..., None], seconds: float, line: str
) -> None:
    ranks = start_ranks(function, 2, tmp_path, options_of(model, tensor_parallel_size=2))
    try:
        ranks.wait_for_step(7)
        check_end(ranks, 1, seconds, line)
    finally:
        ranks.kill()
