"""Requests to an OpenAI server at random times, and when their tokens come."""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from nano_vllm.bench.workload import Workload

LINE_LIMIT = 2**24
"""Bytes of a header line or chunk size line, at the most."""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_BRINGS_TEXT = re.compile(rb'"choices": ?\[ ?\{')
_TELLS_MORE = re.compile(rb'"(?:usage|error|timings)": ?[{"]')
"""Most events do not, and need not be decoded. In a text these would have backslashes."""


@dataclass(slots=True)
class Timeline:
    """One request, in seconds of the monotonic clock."""

    start: float
    chunks: list[float] = field(default_factory=list)
    """When each event with a choice came."""
    num_tokens: int = 0
    status: int = 0
    """Of HTTP; 0 where no answer came."""
    end: float = 0.0
    """When the answer was whole, or failed."""
    error: str | None = None
    engine_ttft: float | None = None
    """Seconds from the engine's taking the request in to its first token, where the server told."""

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.start

    @property
    def e2e(self) -> float:
        return self.chunks[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """None where there is but one token."""
        if self.num_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.num_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one event and the next; an event may bring several tokens."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


class Client:
    """Speaks just enough HTTP, at little cost of its own.

    Args:
        url: of the server, without /v1.
        api_key: None for none.
        timeout: seconds that a request may take.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the URL must be like http://127.0.0.1:8000, got {url!r}")
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._timeout = timeout
        self._idle: list[Connection] = []

    async def models(self) -> list[str]:
        """Names of the server's models; ValueError where it does not answer."""
        try:
            _, body = await asyncio.wait_for(self._whole("GET", "/v1/models"), 10)
            return [card["id"] for card in json.loads(body)["data"]]
        except (OSError, asyncio.TimeoutError, ValueError, KeyError, TypeError) as error:
            place = f"{self._host} port {self._port}"
            raise ValueError(f"no OpenAI server answers at {place}: {error}") from None

    async def complete(self, body: dict[str, Any]) -> Timeline:
        """Stream one completion; what goes wrong is in the timeline."""
        data = json.dumps(body).encode()
        timeline = Timeline(time.monotonic())
        try:
            await asyncio.wait_for(self._stream(data, timeline), self._timeout)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            timeline.error = f"{type(error).__name__}: {error}"
        except asyncio.TimeoutError:
            timeline.error = f"no end within {self._timeout:g} s"
        timeline.end = time.monotonic()
        if timeline.error is None and not timeline.chunks:
            timeline.error = "no token came"
        return timeline

    async def _stream(self, body: bytes, timeline: Timeline) -> None:
        pending = b""
        status, parts = await self._request("POST", "/v1/completions", body)
        timeline.status = status
        if status != 200:
            text = b"".join([part async for part in parts])
            timeline.error = f"status {status}: {text[:200].decode(errors='replace')}"
            return
        async for part in parts:
            now = time.monotonic()
            *events, pending = (pending + part).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    continue
                if _BRINGS_TEXT.search(event) and not _TELLS_MORE.search(event):
                    timeline.chunks.append(now)
                    continue
                value = json.loads(event[6:])
                if "error" in value:
                    timeline.error = str(value["error"])[:200]
                if value.get("choices"):
                    timeline.chunks.append(now)
                if value.get("usage"):
                    timeline.num_tokens = value["usage"]["completion_tokens"]
                if timings := value.get("timings"):
                    timeline.engine_ttft = (timings["queue_ms"] + timings["prefill_ms"]) / 1e3

    async def _whole(self, method: str, path: str) -> tuple[int, bytes]:
        status, parts = await self._request(method, path)
        return status, b"".join([part async for part in parts])

    async def _request(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[int, AsyncIterator[bytes]]:
        """Status, and the body as it comes."""
        request = (
            f"{method} {self._path}{path} HTTP/1.1\r\nhost: {self._host}\r\n{self._key}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body
        while True:
            is_used = bool(self._idle)
            connection = self._idle.pop() if is_used else await self._connect()
            reader, writer = connection
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                break
            except (OSError, asyncio.IncompleteReadError):
                writer.close()
                if not is_used:  # the server may end one that waits
                    raise
        first, *lines = head.lower().splitlines()
        status = first.split()[1:2]
        if not status or not status[0].isdigit():
            writer.close()
            raise ValueError(f"not an HTTP answer: {first[:100]!r}")
        fields = (line.partition(b":") for line in lines)
        headers = {name.strip(): value.strip() for name, _, value in fields}
        return int(status[0]), self._body(connection, headers)

    async def _connect(self) -> Connection:
        return await asyncio.open_connection(
            self._host, self._port, ssl=self._ssl, limit=LINE_LIMIT
        )

    async def _body(
        self, connection: Connection, headers: dict[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        """Keeps the connection for the next request where the body was read to its end."""
        reader, writer = connection
        is_whole = False
        try:
            if headers.get(b"transfer-encoding") == b"chunked":
                async for part in _chunks(reader):
                    yield part
                is_whole = True
            elif b"content-length" in headers:
                yield await reader.readexactly(int(headers[b"content-length"]))
                is_whole = True
            else:
                while part := await reader.read(65536):
                    yield part
        finally:
            if is_whole and headers.get(b"connection") != b"close":
                self._idle.append(connection)
            else:
                writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    data = b""
    while True:
        head, found, rest = data.partition(b"\r\n")
        size = int(head.partition(b";")[0], 16) if found else -1
        if found and len(rest) >= size + 2:
            if size == 0:
                return
            yield rest[:size]
            data = rest[size + 2 :]
            continue
        more = await reader.read(65536)
        if not more:
            raise asyncio.IncompleteReadError(data, None)
        data += more


async def send_load(
    client: Client,
    workload: Workload,
    model: str,
    request_rate: float,
    max_concurrency: int | None,
    seed: int,
    timings: bool = False,
) -> tuple[list[Timeline], float]:
    """Send a workload's prompts, the waits between them drawn so that they are a Poisson process.

    Args:
        client: sends them.
        workload: prompts and lengths of outputs.
        model: its name.
        request_rate: requests a second; infinite for all at once.
        max_concurrency: requests at the same time; None for any number.
        seed: of the waits.
        timings: ask the server for its own times, which nano_vllm's tells.

    Returns:
        a timeline for each prompt, and seconds from the first request to the last token.
    """
    draw = random.Random(seed)
    room = asyncio.Semaphore(max_concurrency or len(workload.prompts))

    async def one(prompt: list[int], output_len: int) -> Timeline:
        async with room:
            return await client.complete(
                {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": output_len,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    **({"timings": True} if timings else {}),
                }
            )

    start = due = time.monotonic()
    tasks = []
    for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True):
        # By the clock, so that a late start does not make all others late.
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(prompt, output_len)))
        due += draw.expovariate(request_rate) if request_rate != float("inf") else 0.0
    timelines = await asyncio.gather(*tasks)
    return list(timelines), time.monotonic() - start
