"""Starts functions as the ranks of a group: processes forked off one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LOAD_SECONDS = 60
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.rank_functions"])


@dataclass
class Ranks:
    """Processes of one group, and what each has written."""

    processes: list[BaseProcess]
    folder: Path
    port: int

    def join(self, timeout: float) -> list[int | None]:
        """Exit codes; None for a process that has not ended in time, which is then killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def errors(self, rank: int) -> str:
        """What a rank has written to its standard error."""
        return (self.folder / f"stderr.{rank}").read_text(encoding="utf-8")

    def step(self) -> int:
        """The last step that the first rank has reported; -1 while there is none."""
        path = self.folder / "step"
        return int(path.read_text() or -1) if path.exists() else -1

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + LOAD_SECONDS
        while self.step() < step:
            assert time.monotonic() < end, [self.errors(r) for r in range(len(self.processes))]
            time.sleep(0.01)


def start_ranks(
    function: Callable[..., None], size: int, folder: Path, *args: Any, **environment: str
) -> Ranks:
    """Start `function(*args)` in each of so many processes, in torchrun's environment."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(size):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        process = _context.Process(target=_run, args=(function, folder, variables, args))
        process.start()
        processes.append(process)
    return Ranks(processes, folder, port)


def _run(
    function: Callable[..., None], folder: Path, variables: dict[str, str], args: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    errors = os.open(folder / f"stderr.{variables['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    function(folder, *args)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
