"""Progress of requests on its way to one reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nano_vllm.engine.messages import RequestDelta

Taker = Callable[[int, RequestDelta], bool]
"""Takes what the prompt of a place gained, or says that it did not."""


class EngineError(Exception):
    """The engine cannot go on; its message may be shown to users."""


class OutputStream:
    """What the prompts of one call gained, merged while nobody reads it.

    Args:
        request_ids: the engine's name of each prompt.
    """

    def __init__(self, request_ids: list[str]) -> None:
        self.request_ids = request_ids
        self.engines = [0] * len(request_ids)
        """By prompt, the replica that it runs in."""
        self._pending: dict[int, RequestDelta] = {}
        """By prompt."""
        self._parts: dict[int, RequestDelta] = {}
        """By prompt; of deltas that came in part."""
        self.taker: Taker | None = None
        """Is offered what comes while the reader waits: to wake it costs more than most deltas."""
        self._num_open = len(request_ids)
        self._error: Exception | None = None
        self._wake: asyncio.Future[None] | None = None

    def put(self, place: int, delta: RequestDelta) -> None:
        """Take in what the prompt of that place gained; nothing behind an error."""
        if self._error is not None:
            return
        if place in self._parts:
            self._parts[place].absorb(delta)
            delta = self._parts[place]
        if delta.is_part:
            self._parts[place] = delta
            return
        self._parts.pop(place, None)
        if self.taker is not None and not delta.finished and self._is_awaited:
            try:
                if self.taker(place, delta):
                    return
            except Exception as error:
                self.fail(error)
                return
        if place in self._pending:
            self._pending[place].absorb(delta)
        else:
            self._pending[place] = delta
        self._num_open -= delta.finished
        self._ring()

    def fail(self, error: Exception) -> None:
        """End with an error, behind what came before."""
        self._error = error
        self._ring()

    async def next(self) -> list[tuple[int, RequestDelta]] | None:
        """What was gained since the last call, by prompt; None behind the end of all."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._num_open == 0:
                return None
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        pending, self._pending = self._pending, {}
        return list(pending.items())

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that came and were not read."""
        return sum(delta.num_tokens for delta in self._pending.values()) if self._pending else 0

    @property
    def _is_awaited(self) -> bool:
        """Whether the reader waits, with all that came before read."""
        return self._wake is not None and not self._wake.done()

    def _ring(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
