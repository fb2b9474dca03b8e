"""In which order the API process tells requests what they gained."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest

from nano_vllm import SamplingParams
from nano_vllm.config import EngineConfig
from nano_vllm.engine import async_llm
from nano_vllm.engine.async_llm import TOLD_AT_ONCE, AsyncLLM
from nano_vllm.engine.messages import (
    Add,
    CompletionDelta,
    Deltas,
    FromEngine,
    Ready,
    Refused,
    RequestDelta,
)
from nano_vllm.engine.output_stream import EngineError, OutputStream

NUM_STREAMS = 8 * TOLD_AT_ONCE


class SilentProcesses:
    """An engine that says what the test puts into its queue."""

    def __init__(self, *_: Any) -> None:
        self.added: list[str] = []
        self.says: asyncio.Queue[FromEngine | None] = asyncio.Queue()

    async def start(self) -> Ready:
        return Ready(300, 128, 64, 8, "cpu")

    def send(self, message: Any) -> None:
        if isinstance(message, Add):
            self.added.append(message.request_id)

    async def read(self) -> FromEngine | None:
        return await self.says.get()

    async def close(self) -> None:
        pass


class Scene:
    """Streams that have had their first token."""

    def __init__(self, llm: AsyncLLM, engine: SilentProcesses) -> None:
        self.llm, self.engine = llm, engine
        self.told: list[tuple[str, list[int]]] = []
        """Request ids, and which tokens they were told, in order."""
        self.outputs: list[OutputStream] = []

    def submit(self) -> str:
        self.outputs.append(self.llm.submit([([1, 2], SamplingParams())], stream=True))
        return self.engine.added[-1]

    def gain(self, request_ids: list[str], token: int, finished: bool = False) -> None:
        self.engine.says.put_nowait(
            Deltas(
                [RequestDelta(i, [CompletionDelta(0, "", [token])], finished) for i in request_ids]
            )
        )

    async def settle(self) -> None:
        for _ in range(20 * NUM_STREAMS):
            await asyncio.sleep(0)


def play(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Scene, list[str]], Awaitable[None]]
) -> None:
    engine = SilentProcesses()
    monkeypatch.setattr(async_llm, "RankProcesses", lambda *_: engine)

    async def scenario() -> None:
        engine.says = asyncio.Queue()  # of this loop
        llm = AsyncLLM(EngineConfig("nothing"))
        scene = Scene(llm, engine)
        old_put = OutputStream.put

        def put(output: OutputStream, place: int, delta: RequestDelta) -> None:
            scene.told.append((delta.request_id, list(delta.completions[0].token_ids)))
            old_put(output, place, delta)

        monkeypatch.setattr(OutputStream, "put", put)
        await llm.start()
        ids = [scene.submit() for _ in range(NUM_STREAMS)]
        scene.gain(ids, 0)
        await scene.settle()
        assert scene.told == [(i, [0]) for i in ids]
        scene.told.clear()
        await act(scene, ids)
        await llm.close()

    asyncio.run(scenario())


def test_a_first_token_goes_ahead_of_what_others_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        late = scene.submit()
        scene.gain(ids, 1)
        scene.gain([late], 1)
        await scene.settle()
        assert scene.told.index((late, [1])) <= 2 * TOLD_AT_ONCE
        scene.told.remove((late, [1]))
        assert scene.told == [(i, [1]) for i in ids]

    play(monkeypatch, act)


def test_other_work_goes_on_between(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        seen = []

        async def watch() -> None:
            while len(scene.told) < NUM_STREAMS:
                seen.append(len(scene.told))
                await asyncio.sleep(0)

        scene.gain(ids, 1)
        await watch()
        steps = [b - a for a, b in pairwise(seen)]
        assert max(steps) == TOLD_AT_ONCE

    play(monkeypatch, act)


def test_what_waits_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        for token in (1, 2, 3):
            scene.gain(ids, token)
        await scene.settle()
        tokens: dict[str, list[int]] = {i: [] for i in ids}
        for request_id, gained in scene.told:
            tokens[request_id] += gained
        assert tokens == {i: [1, 2, 3] for i in ids}
        assert len(scene.told) < 3 * NUM_STREAMS

    play(monkeypatch, act)


def test_the_end_comes_behind_all_that_was_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        scene.gain(ids, 1, finished=True)
        scene.engine.says.put_nowait(None)
        await scene.settle()
        assert scene.told == [(i, [1]) for i in ids]
        assert scene.llm.num_unfinished == 0
        for output in scene.outputs:
            ((_, delta),) = await output.next() or []
            assert delta.finished
        with pytest.raises(EngineError, match="the engine is not running"):
            scene.submit()

    play(monkeypatch, act)


def test_an_error_comes_behind_what_was_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        prompts = [([1, 2], SamplingParams())] * 2
        output = scene.llm.submit(prompts, stream=True)
        begun, refused = scene.engine.added[-2:]
        scene.gain([begun], 0)
        scene.gain([*ids, begun], 1)
        scene.engine.says.put_nowait(Refused(refused, "too long"))
        await scene.settle()
        ((_, delta),) = await output.next() or []
        assert delta.completions[0].token_ids == [0, 1]
        with pytest.raises(ValueError, match="too long"):
            await output.next()
        scene.told.clear()
        scene.gain(ids, 2)
        while not scene.told:
            await asyncio.sleep(0)
        scene.llm.fail_all("the end")
        assert scene.told == [(i, [2]) for i in ids]
        for output in scene.outputs:
            ((_, delta),) = await output.next() or []
            assert delta.completions[0].token_ids == [0, 1, 2]
            with pytest.raises(EngineError, match="the end"):
                await output.next()

    play(monkeypatch, act)


def test_a_first_token_behind_parts_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        late = scene.submit()
        part = RequestDelta(late, [CompletionDelta(0, "", [])], False, is_part=True)
        scene.gain(ids, 1)
        scene.engine.says.put_nowait(Deltas([part]))
        scene.gain([late], 1)
        await scene.settle()
        assert scene.told.index((late, [1])) <= 3 * TOLD_AT_ONCE

    play(monkeypatch, act)


def test_who_left_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(scene: Scene, ids: list[str]) -> None:
        scene.gain(ids, 1)
        while not scene.told:
            await asyncio.sleep(0)
        scene.llm.abort(scene.outputs[-1])
        await scene.settle()
        assert scene.told == [(i, [1]) for i in ids[:-1]]

    play(monkeypatch, act)
