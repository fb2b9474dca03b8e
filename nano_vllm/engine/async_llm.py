"""The asynchronous front door: an engine in a process of its own, many requests at once."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

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
TOLD_AT_ONCE = 32
"""Requests that are told what they gained, some 30 us each, before the event loop looks at what
else has come: a new request, or the first token of one, waits for no more of them.
"""
MAX_TURNS = 20
"""Of the event loop, for others, between two such bunches."""
IDLE_TURN = 3e-5
"""Seconds that a turn of the event loop takes at the most where nobody else has work."""


@dataclass(slots=True)
class _Reader:
    """Where the deltas of a request go."""

    output: OutputStream
    place: int
    """As which prompt."""
    has_begun: bool = False


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
        self._readers: dict[str, _Reader] = {}
        """By the engine's request id."""
        self._gained: OrderedDict[str, RequestDelta] = OrderedDict()
        """By request id, what is still to be told to those that have begun."""
        self._has_gained = asyncio.Event()
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
            asyncio.create_task(self._tell_gained()),
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
        self._readers[request_id] = _Reader(output, place)
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
        unfinished = [i for i in output.request_ids if self._readers.pop(i, None) is not None]
        if unfinished and not self._is_dead:
            self._processes.send(Abort(unfinished))

    def fail_all(self, message: str) -> None:
        """End all requests with an error, behind what they gained."""
        self._tell(len(self._gained))
        for output in self._outputs():
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
        return len(self._readers)

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
            await asyncio.sleep(0)  # more may have been read already: nothing else would run
        self._tell(len(self._gained))
        self._die(reason)

    async def _tell_gained(self) -> None:
        while True:
            await self._has_gained.wait()
            while self._gained:
                self._tell(TOLD_AT_ONCE)
                await _give_way()
            self._has_gained.clear()

    def _tell(self, most: int) -> None:
        """Tell those that wait longest what they gained; at most so many."""
        for _ in range(min(most, len(self._gained))):
            request_id, delta = self._gained.popitem(last=False)
            reader = self._readers.get(request_id)
            if reader is not None:
                self._put(reader, delta)

    def _put(self, reader: _Reader, delta: RequestDelta) -> None:
        if delta.finished:
            del self._readers[delta.request_id]
        reader.output.put(reader.place, delta)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            for delta in message.requests:
                reader = self._readers.get(delta.request_id)
                if reader is None:
                    continue
                if not reader.has_begun:  # a first token is waited for
                    reader.has_begun = not delta.is_part
                    self._put(reader, delta)
                elif delta.request_id in self._gained:
                    self._gained[delta.request_id].absorb(delta)
                else:
                    self._gained[delta.request_id] = delta
            if self._gained:
                self._has_gained.set()
        elif isinstance(message, Refused):
            reader = self._readers.get(message.request_id)
            if reader is not None:
                self._tell(len(self._gained))  # other prompts of its call, too
                self.abort(reader.output)
                reader.output.fail(ValueError(message.message))
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
        outputs = self._outputs()
        self._readers.clear()
        for output in outputs:
            output.fail(EngineError(reason))

    def _outputs(self) -> list[OutputStream]:
        return list({id(r.output): r.output for r in self._readers.values()}.values())


async def _give_way() -> None:
    """Let the event loop turn until there is nothing else to do: a request takes several turns from
    the socket to the engine.
    """
    for _ in range(MAX_TURNS):
        start = time.monotonic()
        await asyncio.sleep(0)
        if time.monotonic() - start < IDLE_TURN:
            return
