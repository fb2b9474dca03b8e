"""The asynchronous front door: an engine in a process of its own, many requests at once."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence

from nano_vllm.config import EngineConfig
from nano_vllm.engine.messages import (
    Abort,
    Add,
    Deltas,
    Failed,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Refused,
    RequestDelta,
    Search,
)
from nano_vllm.engine.output_stream import EngineError, OutputStream
from nano_vllm.engine.rank_processes import RankProcesses
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams

PING_SECONDS = 1.0


class AsyncLLM:
    """A model in another process, or in several that are its ranks. All methods belong to one event
    loop.

    Args:
        config: the engine's options.
        step_timeout: seconds without a sign of life after which the engine counts as stuck.
        replica: which of several engines this is.
        num_replicas: engines that share the host's GPUs and cores.
    """

    def __init__(
        self,
        config: EngineConfig,
        step_timeout: float = 60.0,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.config = config
        self._step_timeout = step_timeout
        self._processes = RankProcesses(config, replica, num_replicas)
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: dict[str, tuple[OutputStream, int]] = {}
        """By the engine's request id: where its deltas go, and as which prompt."""
        self._asked: float | None = None
        """When the ping was sent that is not answered yet."""
        self._is_closing = False
        self._has_dumped = False
        self._pong_waiters: list[asyncio.Future[Pong]] = []
        self.ready: Ready | None = None
        """None while the model loads."""
        self.pong: Pong | None = None
        """The last sign of life."""
        self.death: asyncio.Future[str] | None = None
        """Why the engine ended, when it does so uncalled for."""

    async def start(self) -> Ready:
        """Start the process and load the model; ValueError says in one line why it cannot be."""
        self.death = asyncio.get_running_loop().create_future()
        first = await self._processes.start()
        if isinstance(first, Failed):
            raise ValueError(first.message)
        if not isinstance(first, Ready):
            raise EngineError("the engine process ended while it loaded the model")
        self.ready = first
        self._tasks = [
            asyncio.create_task(self._receive()),
            asyncio.create_task(self._ping()),
        ]
        return first

    def submit(
        self,
        prompts: Sequence[tuple[list[int], SamplingParams | BeamSearchParams]],
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> OutputStream:
        """Queue prompts that passed the gate.

        Args:
            prompts: token ids of each, and how to sample or to search.
            stream: report every step, not the final results alone; a beam search has no others.
            priority: the lowest goes first, under scheduling_policy priority.
            cache_salt: prompts find the cached blocks of others with the same salt alone.

        Returns:
            their progress; `abort` it when it is not read to its end.
        """
        output = OutputStream([secrets.token_hex(8) for _ in prompts])
        for place, (token_ids, params) in enumerate(prompts):
            self.add(output, place, token_ids, params, stream, priority, cache_salt)
        return output

    def add(
        self,
        output: OutputStream,
        place: int,
        prompt_token_ids: list[int],
        params: SamplingParams | BeamSearchParams,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue the prompt of that place in a stream, as `submit` does."""
        if self._is_dead:
            raise EngineError("the engine is not running")
        request_id = output.request_ids[place]
        self._streams[request_id] = output, place
        now = time.monotonic()
        if isinstance(params, BeamSearchParams):
            message: Add | Search = Search(
                request_id, prompt_token_ids, params, priority, cache_salt, now
            )
        else:
            message = Add(request_id, prompt_token_ids, params, stream, priority, cache_salt, now)
        self._processes.send(message)

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams | BeamSearchParams,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestDelta]:
        """What one prompt's completions gain, as it comes; leaving the loop aborts them."""
        output = self.submit([(prompt_token_ids, params)], True, priority, cache_salt)
        try:
            while (deltas := await output.next()) is not None:
                for _, delta in deltas:
                    yield delta
        finally:
            self.abort(output)

    def abort(self, output: OutputStream) -> None:
        """End what is unfinished of these prompts; fine behind their end too."""
        unfinished = [i for i in output.request_ids if self._streams.pop(i, None) is not None]
        if unfinished and not self._is_dead:
            self._processes.send(Abort(unfinished))

    def fail_all(self, message: str) -> None:
        """End all requests with an error."""
        for output in {id(o): o for o, _ in self._streams.values()}.values():
            self.abort(output)
            output.fail(EngineError(message))

    async def look(self, timeout: float = 2.0) -> Pong:
        """The engine as it is now, with its picture; TimeoutError where it does not answer."""
        future: asyncio.Future[Pong] = asyncio.get_running_loop().create_future()
        if all(waiter.done() for waiter in self._pong_waiters):
            self._pong_waiters.clear()
            self._processes.send(Ping(with_picture=True))
        self._pong_waiters.append(future)
        try:
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            raise TimeoutError("the engine does not answer") from None

    @property
    def num_unfinished(self) -> int:
        """Prompts under way."""
        return len(self._streams)

    @property
    def is_stuck(self) -> bool:
        """Whether the engine has given no sign of life for too long."""
        return self._asked is not None and time.monotonic() - self._asked > self._step_timeout

    @property
    def _is_dead(self) -> bool:
        return self.death is None or self.death.done()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served."""
        return self.ready is not None and not self._is_dead and not self.is_stuck

    async def close(self) -> None:
        """End the engine process: it gives the memory back, or is killed."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        if self.ready is None:
            self.kill()
        await self._processes.close()

    def kill(self) -> None:
        """End the engine at once."""
        self._processes.kill()

    async def _receive(self) -> None:
        reason = "the engine process ended"
        while (message := await self._processes.read()) is not None:
            if isinstance(message, Failed):
                reason = f"the engine failed: {message.message}"
            self._take(message)
            # Whoever got a first token sends it ahead of the tokens of all others.
            await asyncio.sleep(0)
        self._die(reason)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            for delta in message.requests:
                output, place = self._streams.get(delta.request_id, (None, 0))
                if output is not None:
                    if delta.finished:
                        del self._streams[delta.request_id]
                    output.put(place, delta)
        elif isinstance(message, Refused):
            output, _ = self._streams.get(message.request_id, (None, 0))
            if output is not None:
                self.abort(output)
                output.fail(ValueError(message.message))
        elif isinstance(message, Pong):
            self.pong, self._asked, self._has_dumped = message, None, False
            if message.picture is not None:
                waiters, self._pong_waiters = self._pong_waiters, []
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(message)

    async def _ping(self) -> None:
        while True:
            if self._asked is None:
                self._asked = time.monotonic()
                self._processes.send(Ping())
            elif self.is_stuck and not self._has_dumped:
                self._has_dumped = True
                print("error: the engine is stuck; its stacks:", file=sys.stderr, flush=True)
                self._processes.dump_stacks()
            await asyncio.sleep(PING_SECONDS)

    def _die(self, reason: str) -> None:
        if self._is_closing or self.death is None or self.death.done():
            return
        self.death.set_result(reason)
        outputs = {id(o): o for o, _ in self._streams.values()}
        self._streams.clear()
        for output in outputs.values():
            output.fail(EngineError(reason))
