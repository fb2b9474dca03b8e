"""Data parallel: several engines of one model, to the server as one."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial

import msgspec

from nano_vllm.config import EngineConfig
from nano_vllm.engine.async_llm import AsyncLLM
from nano_vllm.engine.messages import Pong, Ready, RequestDelta
from nano_vllm.engine.output_stream import EngineError, OutputStream
from nano_vllm.engine.router import Router
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams


class Replicas:
    """Engines with their own processes, GPUs and KV caches; the Router chooses one for each prompt.
    All methods belong to one event loop.

    When a replica ends, so does what runs in it, with an error, and nothing new is taken in; what
    runs in the others goes on. A replica that is stuck makes all of it count as stuck.

    Args:
        config: the options of each engine.
        num_replicas: engines.
        step_timeout: seconds without a sign of life after which an engine counts as stuck.
    """

    def __init__(
        self, config: EngineConfig, num_replicas: int = 1, step_timeout: float = 60.0
    ) -> None:
        if config.record is not None and num_replicas > 1:
            raise ValueError(
                f"record writes down one engine: data_parallel_size must be 1, got {num_replicas}"
            )
        self._config = config
        self._llms = [
            AsyncLLM(config, step_timeout, replica, num_replicas) for replica in range(num_replicas)
        ]
        self._router = Router(num_replicas, config.block_size, 0)
        self.ready: Ready | None = None
        """What holds for all; None while the model loads."""
        self.death: asyncio.Future[str] | None = None
        """Why one of them ended, when it does so uncalled for."""

    async def start(self) -> Ready:
        """Start all at once; ValueError says in one line why one cannot be."""
        self.death = asyncio.get_running_loop().create_future()
        starts = [asyncio.create_task(llm.start()) for llm in self._llms]
        try:
            readies = await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()
        devices = {ready.device.partition(":")[0] for ready in readies}
        if len(devices) > 1:
            found = ", ".join(f"{i} {ready.device}" for i, ready in enumerate(readies))
            raise ValueError(
                f"the replicas must all have a GPU, or none of them; they got: {found}"
            )
        self.ready = msgspec.structs.replace(
            readies[0],
            max_model_len=min(ready.max_model_len for ready in readies),
            num_blocks=min(ready.num_blocks for ready in readies),
        )
        has_choice = len(self._llms) > 1 and self._config.enable_prefix_caching
        self._router = Router(
            len(self._llms), self.ready.block_size, self.ready.num_blocks if has_choice else 0
        )
        for replica, llm in enumerate(self._llms):
            assert llm.death is not None, "it was started"
            llm.death.add_done_callback(partial(self._die, replica))
        return self.ready

    def submit(
        self,
        prompts: Sequence[tuple[list[int], SamplingParams | BeamSearchParams]],
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> OutputStream:
        """Queue prompts as AsyncLLM does, each where it has least to wait for. `abort` the result,
        also behind an error.
        """
        if any(llm.death is None or llm.death.done() for llm in self._llms):
            raise EngineError("the engine is not running")
        output = _RoutedStream([secrets.token_hex(8) for _ in prompts], self._router)
        for place, (token_ids, params) in enumerate(prompts):
            request_id = output.request_ids[place]
            replica = self._router.route(request_id, token_ids, params.num_sequences, cache_salt)
            output.engines[place] = replica
            self._llms[replica].add(output, place, token_ids, params, stream, priority, cache_salt)
        return output

    def abort(self, output: OutputStream) -> None:
        """End what is unfinished of these prompts; fine behind their end too."""
        for request_id in output.request_ids:
            self._router.end(request_id)
        for llm in self._llms:
            llm.abort(output)

    def fail_all(self, message: str) -> None:
        """End all requests with an error."""
        for llm in self._llms:
            llm.fail_all(message)

    async def look(self, engine: int, timeout: float = 2.0) -> Pong:
        """An engine as it is now, with its picture; TimeoutError where it does not answer."""
        return await self._llms[engine].look(timeout)

    @property
    def num_engines(self) -> int:
        return len(self._llms)

    @property
    def pongs(self) -> list[Pong | None]:
        """The last sign of life of each engine."""
        return [llm.pong for llm in self._llms]

    @property
    def num_unfinished(self) -> int:
        """Prompts under way."""
        return sum(llm.num_unfinished for llm in self._llms)

    @property
    def is_stuck(self) -> bool:
        """Whether an engine has given no sign of life for too long."""
        return any(llm.is_stuck for llm in self._llms)

    async def close(self) -> None:
        """End all processes: they give the memory back, or are killed."""
        await asyncio.gather(*(llm.close() for llm in self._llms))

    def kill(self) -> None:
        """End all processes at once."""
        for llm in self._llms:
            llm.kill()

    def _die(self, replica: int, death: asyncio.Future[str]) -> None:
        if self.death is not None and not self.death.done() and not death.cancelled():
            name = f"replica {replica}: " if len(self._llms) > 1 else ""
            self.death.set_result(name + death.result())


class _RoutedStream(OutputStream):
    """Tells the router how its prompts get on."""

    def __init__(self, request_ids: list[str], router: Router) -> None:
        super().__init__(request_ids)
        self._router = router
        self._begun: set[int] = set()
        """Prompts a token of which came."""

    def put(self, place: int, delta: RequestDelta) -> None:
        if delta.finished:
            self._router.end(delta.request_id)
        elif place not in self._begun:
            self._begun.add(place)
            self._router.note_progress(delta.request_id)
        super().put(place, delta)
