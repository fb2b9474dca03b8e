"""Clients that stream completions, many at once, and may leave at any point."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httptools

LONGEST_WAIT = 0.5
"""Seconds in which somebody leaves who has sent the request and read nothing."""


@dataclass
class Leaving:
    """Where a client goes; of the first two at the most one is given."""

    sent: float = 1.0
    """Share of the request that it sends."""
    waits: float | None = None
    """Seconds that it stays behind the request, without reading."""
    received: int = 0
    """Bytes of the answer, head and all, that it reads."""
    resets: bool = False
    """Whether the connection is reset, not closed."""

    @classmethod
    def draw(cls, draw: random.Random) -> Leaving:
        """Somewhere in the request, in the wait for the answer, or most often in the answer."""
        resets, place = draw.random() < 0.5, draw.random()
        if place < 0.15:
            return cls(sent=draw.random(), resets=resets)
        if place < 0.4:
            return cls(waits=draw.random() * LONGEST_WAIT, resets=resets)
        return cls(received=draw.randrange(1, 8000), resets=resets)


class _Answer:
    """What httptools reports of a response."""

    def __init__(self) -> None:
        self.body = b""
        self.is_complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True


def request_bytes(path: str, body: Any, *headers: str) -> bytes:
    """A POST request as it goes over the connection."""
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "host: a", "content-type: application/json"]
    lines = [*head, f"content-length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def stream(url: str, body: dict[str, Any], leaving: Leaving | None = None) -> str | None:
    """The text of one streamed completion; None where the client left before it had all."""
    host, port = url.removeprefix("http://").split(":")
    request = request_bytes("/v1/completions", {**body, "stream": True})
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        if leaving is None:
            writer.write(request)
            return await _read(reader)
        writer.write(request[: int(len(request) * leaving.sent)])
        await writer.drain()
        if leaving.waits is not None:
            await asyncio.sleep(leaving.waits)
        elif leaving.sent == 1 and await _read(reader, leaving.received) is not None:
            return None  # the answer was shorter
        if leaving.resets:
            writer.transport.abort()
        return None
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, most: int | None = None) -> str | None:
    """The answer's text; None where that many bytes come before its end."""
    answer, num_bytes = _Answer(), 0
    parser = httptools.HttpResponseParser(answer)
    while not answer.is_complete:
        data = await reader.read(65536 if most is None else min(65536, most - num_bytes))
        assert data, f"the server left behind {answer.body[-200:]!r}"
        num_bytes += len(data)
        parser.feed_data(data)
        if num_bytes == most:
            return None
    assert parser.get_status_code() == 200, answer.body
    *events, last, end = answer.body.split(b"\n\n")
    assert (last, end) == (b"data: [DONE]", b""), answer.body[-200:]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert all("error" not in chunk for chunk in chunks), chunks[-1]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


async def stream_all(
    url: str,
    bodies: list[dict[str, Any]],
    num_clients: int,
    leavings: list[Leaving | None],
    on_end: Callable[[int], None] = lambda number: None,
) -> list[str | None]:
    """What each request brings, with that many under way at once; `on_end` hears how many ended."""
    gate = asyncio.Semaphore(num_clients)
    num_ended = 0

    async def one(body: dict[str, Any], leaving: Leaving | None) -> str | None:
        nonlocal num_ended
        async with gate:
            text = await stream(url, body, leaving)
        num_ended += 1
        on_end(num_ended)
        return text

    return await asyncio.gather(*map(one, bodies, leavings))
