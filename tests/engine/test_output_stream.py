"""Who gets what a stream's requests gain: its reader, or a taker while the reader waits."""

from __future__ import annotations

import asyncio

import pytest

from nano_vllm.engine.messages import CompletionDelta, RequestDelta
from nano_vllm.engine.output_stream import OutputStream


def delta(text: str, finished: bool = False) -> RequestDelta:
    return RequestDelta("a", [CompletionDelta(0, text, [1])], finished)


def text_of(gained: list[tuple[int, RequestDelta]] | None) -> str:
    return "".join(d.completions[0].text for _, d in gained or [])


def test_a_taker_is_offered_what_comes_while_the_reader_waits() -> None:
    async def scenario() -> None:
        output, taken = OutputStream(["a"]), []

        def take(place: int, gained: RequestDelta) -> bool:
            taken.append(text_of([(place, gained)]))
            return gained.completions[0].text != "refused "

        output.taker = take
        output.put(0, delta("before anybody reads "))
        assert text_of(await output.next()) == "before anybody reads "
        reading = asyncio.create_task(output.next())
        await asyncio.sleep(0)
        for text in ("one ", "two ", "refused ", "behind it "):
            output.put(0, delta(text))
        assert text_of(await reading) == "refused behind it "
        assert taken == ["one ", "two ", "refused "]
        reading = asyncio.create_task(output.next())
        await asyncio.sleep(0)
        output.put(0, delta("three "))
        output.put(0, delta("the end", finished=True))
        assert text_of(await reading) == "the end"
        assert taken[3:] == ["three "]
        assert await output.next() is None

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_a_taker_that_fails_ends_its_stream_and_no_other() -> None:
    async def scenario() -> None:
        output = OutputStream(["a"])

        def take(place: int, gained: RequestDelta) -> bool:
            raise KeyError("no such choice")

        output.taker = take
        reading = asyncio.create_task(output.next())
        await asyncio.sleep(0)
        output.put(0, delta("text"))  # raises nothing: whoever puts serves others too
        output.put(0, delta("behind what was lost"))
        with pytest.raises(KeyError, match="no such choice"):
            await reading

    asyncio.run(asyncio.wait_for(scenario(), 5))
