"""Runs an answer: from its prompts to a JSON response or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nano_vllm.engine.messages import CompletionDelta, RequestDelta
from nano_vllm.engine.output_stream import EngineError, OutputStream
from nano_vllm.server.answer import Answer
from nano_vllm.server.errors import ApiError
from nano_vllm.server.event import END, event
from nano_vllm.server.http_body import Disconnected, Receive
from nano_vllm.server.service import Service

MAX_PENDING_TOKENS = 2**16
"""Of a stream whose client does not read: more, and it is cut off."""
LARGE_ANSWER = 2**10
"""Tokens; what has more is put together beside the event loop."""
PART_OF_BODY = 2**18
"""Bytes; what is longer is sent in parts, each when the client has read most of those before."""
ABORT_CONNECTION = "nano_vllm.abort_connection"
"""The extension of the ASGI scope that drops the connection at once."""
WRITE_PART = "nano_vllm.write_part"
"""The extension that writes a part of the body at once; it says whether it could."""
CAN_WRITE = "nano_vllm.can_write"
"""The extension that says whether it can."""
WHEN_GONE = "nano_vllm.when_gone"
"""The extension that calls what it is given, once, when the client has gone; None takes it back."""
_ENCODER = msgspec.json.Encoder()
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")


class TimedOut(Exception):
    """A request took too long."""


async def respond(service: Service, answer: Answer, request: Request) -> Response:
    """The response to a request that passed the gate.

    Args:
        service: has the engine.
        answer: what is to be told.
        request: says when the client goes.
    """
    run = Run(service, answer)
    if answer.request.stream:
        return EventStream(run)
    return await run.whole(request.scope, request.receive)


class Run:
    """One answer's way through the engine. End it with `close`."""

    def __init__(self, service: Service, answer: Answer) -> None:
        self._service = service
        self._answer = answer
        self._output: OutputStream = service.submit(answer)
        self._places = [i for i, p in enumerate(answer.prompts) if p.needs_engine]
        self._engines = dict(zip(self._places, self._output.engines, strict=True))
        self._early = answer.without_engine()
        timeout = service.config.request_timeout
        self._timer = asyncio.get_running_loop().call_later(timeout, self._time_out)

    @property
    def answer(self) -> Answer:
        return self._answer

    @property
    def num_pending_tokens(self) -> int:
        return self._output.num_pending_tokens

    @property
    def read_timeout(self) -> float:
        return self._service.config.read_timeout

    async def next(self) -> list[tuple[int, RequestDelta]] | None:
        """What was gained, by prompt; None at the end. ApiError where it cannot go on."""
        if self._early:
            deltas, self._early = self._early, []
        else:
            try:
                gained = await self._output.next()
            except EngineError as error:
                raise ApiError(503, str(error)) from None
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            except TimedOut:
                timeout = self._service.config.request_timeout
                raise ApiError(504, f"the request took more than {timeout:g} s") from None
            if gained is None:
                return None
            deltas = [(self._places[i], delta) for i, delta in gained]
        for place, delta in deltas:
            self._answer.note(place, delta)
            if (completion := _aborted(delta)) is not None:
                raise ApiError(500, str(completion.stop_reason))
            if delta.finished:
                self._service.metrics.observe(
                    self._answer, place, delta, self._engines.get(place, 0)
                )
        return deltas

    def send_by(self, write: Callable[[bytes], Any], can_write: Callable[[], bool]) -> None:
        """Send what is small as it comes, where it can be sent; `next` gives what is left."""

        def take(index: int, delta: RequestDelta) -> bool:
            if delta.size > LARGE_ANSWER or _aborted(delta) or not can_write():
                return False
            place = self._places[index]
            self._answer.note(place, delta)
            if events := self._answer.events(place, delta):
                write(events)
            return True

        self._output.taker = take

    async def whole(self, scope: MutableMapping[str, Any], receive: Receive) -> Response:
        """All of it as one JSON response; Disconnected where the client goes before."""
        with self.open(scope, receive):
            deltas = await self._collect()
            return await self.make(lambda: self._response(deltas), deltas.values())

    async def make(self, work: Callable[[], T], deltas: Iterable[RequestDelta]) -> T:
        """What is made of deltas, beside the event loop where they are large."""
        if sum([delta.size for delta in deltas]) > LARGE_ANSWER:
            return await self._service.in_thread(work)
        return work()

    @contextlib.contextmanager
    def open(self, scope: MutableMapping[str, Any], receive: Receive) -> Iterator[None]:
        """`next` raises Disconnected once the client has gone. Behind it what is unfinished is
        aborted.
        """
        when_gone = scope.get("extensions", {}).get(WHEN_GONE)
        leaving = None
        if when_gone is None:
            leaving = asyncio.create_task(self._wait_until_gone(receive))
        else:
            when_gone(self._leave)
        try:
            yield
        finally:
            if leaving is not None:
                leaving.cancel()
            else:
                when_gone(None)
            self._timer.cancel()
            self._service.llm.abort(self._output)

    def _leave(self) -> None:
        self._output.fail(Disconnected())

    async def _wait_until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _response(self, deltas: dict[int, RequestDelta]) -> Response:
        body = _ENCODER.encode(self._answer.whole(deltas))
        if len(body) > PART_OF_BODY:
            return InParts(body, self.read_timeout)
        return Response(body, media_type="application/json")

    async def _collect(self) -> dict[int, RequestDelta]:
        total: dict[int, RequestDelta] = {}
        while (deltas := await self.next()) is not None:
            for place, delta in deltas:
                if place in total:
                    total[place].absorb(delta)
                else:
                    total[place] = delta
        return total

    def _time_out(self) -> None:
        self._service.llm.abort(self._output)
        self._output.fail(TimedOut())


class EventStream(Response):
    """Server-sent events, each of all that came since the last; none waits for a slow client.

    The status is told with the first of them: what cannot begin is still an error response.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        with contextlib.suppress(Disconnected), self._run.open(scope, receive):
            await self._stream(scope, receive, send)

    async def _stream(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        run, answer = self._run, self._run.answer
        try:
            deltas = await run.next()
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        extensions = scope.get("extensions", {})
        write_part = extensions.get(WRITE_PART)
        if write_part is not None:
            run.send_by(write_part, extensions[CAN_WRITE])
        try:
            while deltas is not None:
                events = await run.make(
                    partial(_events, answer, deltas), [delta for _, delta in deltas]
                )
                if events and not (write_part and write_part(events)):
                    await self._put(scope, send, events)
                if run.num_pending_tokens > MAX_PENDING_TOKENS:
                    _cut_off(scope)
                deltas = await run.next()
            last = answer.last_chunk()
            end = END if last is None else event(last) + END
        except ApiError as error:
            end = event(error.response) + END
        await self._put(scope, send, end, more=False)

    async def _put(
        self, scope: MutableMapping[str, Any], send: Send, body: bytes, more: bool = True
    ) -> None:
        """Send, and cut off a client that does not take it in time."""
        timer = asyncio.get_running_loop().call_later(self._run.read_timeout, _cut_off, scope)
        try:
            await send({"type": "http.response.body", "body": body, "more_body": more})
        finally:
            timer.cancel()


def _aborted(delta: RequestDelta) -> CompletionDelta | None:
    """A completion that the engine gave up."""
    for completion in delta.completions:
        if completion.finish_reason == "abort":
            return completion
    return None


def _events(answer: Answer, deltas: list[tuple[int, RequestDelta]]) -> bytes:
    return b"".join([answer.events(place, delta) for place, delta in deltas])


def _cut_off(scope: MutableMapping[str, Any]) -> None:
    abort = scope.get("extensions", {}).get(ABORT_CONNECTION)
    if abort is not None:
        abort()


class InParts(Response):
    """JSON that would be too much to send at once; a client that does not read it is cut off.

    Args:
        body: the JSON.
        timeout: seconds in which a part has to be taken.
    """

    def __init__(self, body: bytes, timeout: float) -> None:
        super().__init__(body, media_type="application/json")
        self._timeout = timeout

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for place in range(0, len(self.body), PART_OF_BODY):
            part = self.body[place : place + PART_OF_BODY]
            more = place + PART_OF_BODY < len(self.body)
            message = {"type": "http.response.body", "body": part, "more_body": more}
            try:
                await asyncio.wait_for(send(message), self._timeout)
            except asyncio.TimeoutError:
                _cut_off(scope)
                return


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_ENCODER.encode(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.response, error.status, error.headers)
