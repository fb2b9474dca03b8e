"""The processes of one engine, a rank each: what they find in their environment, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import Launch
from nano_vllm.engine.messages import (
    LENGTH,
    Failed,
    FromEngine,
    Load,
    ToEngine,
    encode,
    from_engine_decoder,
)

END_SECONDS = 5.0
"""For the processes to end by themselves."""
SEQUENCES_PER_REPLICA = 2**40


class RankProcesses:
    """Under torchrun the first rank alone, as the others are there; else all of them, on this host.

    Args:
        config: the engine's options.
        replica: which of several engines this is.
        num_replicas: engines that share the host's GPUs and cores.
    """

    def __init__(self, config: EngineConfig, replica: int, num_replicas: int) -> None:
        self._config = config
        self._replica = replica
        self._num_replicas = num_replicas
        self._processes: list[subprocess.Popen[bytes]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._readers: list[asyncio.StreamReader] = []
        self._unsent: list[bytes] = []

    async def start(self) -> FromEngine | None:
        """Start them; what the first says once it has loaded, or who ends before; None for no word.

        ValueError where there are not GPUs enough.
        """
        for variables in rank_variables(
            self._config, self._replica, self._num_replicas, os.environ
        ):
            await self._start(variables)
        load = Load(self._config, self._replica * SEQUENCES_PER_REPLICA)
        for writer in self._writers:
            writer.write(encode([load]))
        words = [asyncio.create_task(read_message(reader)) for reader in self._readers]
        try:
            # The others have nothing to say, unless they end.
            done, _ = await asyncio.wait(words, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for word in words:
                word.cancel()
        said = [word.result() for word in words if word in done]
        return next((message for message in said if isinstance(message, Failed)), said[0])

    async def _start(self, variables: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "nano_vllm.engine.engine_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **variables},
            )
        self._processes.append(process)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        self._readers.append(reader)
        self._writers.append(writer)

    async def read(self) -> FromEngine | None:
        """The engine's next message; None behind the last one."""
        return await read_message(self._readers[0])

    def send(self, message: ToEngine) -> None:
        """Does not wait. What is sent in one turn of the event loop goes out together: many
        requests can come at once, and a write costs as much as the rest of a message.
        """
        assert self._writers, "the engine was never started"
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(encode([message]))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if not self._writers[0].is_closing():
            self._writers[0].write(b"".join(unsent))

    def dump_stacks(self) -> None:
        """They print what their threads are at."""
        for process in self._processes:
            process.send_signal(signal.SIGUSR1)

    async def close(self) -> None:
        """They end by themselves, or are killed."""
        # Not by a signal first: the closed socket tells the engine to end.
        for writer in self._writers:
            writer.close()
        end = time.monotonic() + END_SECONDS
        while any(process.poll() is None for process in self._processes):
            if time.monotonic() > end:
                await asyncio.to_thread(self.kill)
                return
            await asyncio.sleep(0.05)

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)


def rank_variables(
    config: EngineConfig, replica: int, num_replicas: int, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """What each of a replica's ranks to be started finds in its environment beside `environment`:
    its own GPUs, its share of the cores, and, where they are several, where they meet.

    ValueError where CUDA_VISIBLE_DEVICES names too few GPUs.
    """
    if Launch.from_environment(environment).world_size > 1:
        return [{}]
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    variables = {}
    if num_replicas * num_ranks > 1 and "OMP_NUM_THREADS" not in environment:
        num_cores = len(os.sched_getaffinity(0))
        variables["OMP_NUM_THREADS"] = str(max(1, num_cores // (num_replicas * num_ranks)))
    if num_replicas > 1 and config.device != "cpu":
        gpus = _visible_gpus(num_replicas, num_ranks, environment)
        own = gpus[replica * num_ranks : (replica + 1) * num_ranks]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    if num_ranks == 1:
        return [variables]
    variables |= {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return [{**variables, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_ranks)]


def _visible_gpus(num_replicas: int, num_ranks: int, environment: Mapping[str, str]) -> list[str]:
    needed = num_replicas * num_ranks
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(gpu) for gpu in range(needed)]
    gpus = [gpu for gpu in visible.split(",") if gpu]
    if gpus and len(gpus) < needed:
        raise ValueError(
            f"data_parallel_size = {num_replicas} replicas of {num_ranks} GPUs need {needed}, "
            f"CUDA_VISIBLE_DEVICES has {len(gpus)}: {visible!r}"
        )
    return gpus


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def read_message(reader: asyncio.StreamReader) -> FromEngine | None:
    """The next message; None behind the last one."""
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return from_engine_decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
