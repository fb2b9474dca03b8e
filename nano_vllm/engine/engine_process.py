"""The engine in a process of its own: `python -m nano_vllm.engine.engine_process FD`, where FD is
an inherited Unix socket. Ends with the socket's other side.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from nano_vllm.engine.messages import (
    CACHED,
    FIRST_OWNER,
    FREE,
    LENGTH,
    SHARED,
    Abort,
    Add,
    CompletionDelta,
    Deltas,
    Failed,
    FromEngine,
    Load,
    Picture,
    Ping,
    Pong,
    Ready,
    Refused,
    RequestDelta,
    Search,
    StepNote,
    ToEngine,
    to_engine_decoder,
)
from nano_vllm.engine.outbox import Outbox

if TYPE_CHECKING:
    from nano_vllm.engine.engine import Engine
    from nano_vllm.engine.request import Request

PICTURE_BLOCKS = 2048
PICTURE_STEPS = 120
EXIT_SECONDS = 10
TOKENS_PER_MESSAGE = 128
"""With log-probabilities, which are up to 21 entries a token."""
NUM_OWNERS = 250
"""Sequences that a picture can tell apart."""


class EngineLoop:
    """Steps the engine while it has work. While it has none, it prepares for work to come, and then
    sleeps on its inbox.

    Args:
        engine: does the work.
        inbox: messages to the engine; None is the last one.
        send: takes messages from the engine; does not wait.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        engine: Engine,
        inbox: queue.SimpleQueue[ToEngine | None],
        send: Callable[[FromEngine], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._send = send
        self._clock = clock
        self._steps: deque[StepNote] = deque(maxlen=PICTURE_STEPS)
        self._step_seconds = 0.0
        self._host_seconds = 0.0
        self._num_tokens = 0
        """Of the step."""
        self._is_stopped = False

    def run(self) -> None:
        """Until it is told to stop."""
        end: float | None = None
        while True:
            if not self._engine.has_work:
                end = None
                while self._inbox.empty() and self._engine.prepare_graph():
                    pass
                self._handle(self._inbox.get())
            while not self._inbox.empty():
                self._handle(self._inbox.get())
            if self._is_stopped:
                return
            if not self._engine.has_work:
                continue
            start = self._clock()
            if end is not None:
                self._host_seconds += start - end
            self._num_tokens = 0
            self._engine.advance(self._report)
            end = self._clock()
            self._step_seconds += end - start
            num_running = self._engine.scheduler.num_running
            self._steps.append(StepNote(end, end - start, num_running, self._num_tokens))

    def _report(self, requests: list[Request]) -> None:
        deltas = [delta_of(request) for request in requests]
        self._num_tokens += sum(delta.num_tokens for delta in deltas)
        if any(delta.size > TOKENS_PER_MESSAGE for delta in deltas):
            for delta in deltas:
                for part in parts_of(delta):
                    self._send(Deltas([part]))
        elif deltas:
            self._send(Deltas(deltas))

    def _handle(self, message: ToEngine | None) -> None:
        engine = self._engine
        if isinstance(message, (Add, Search)):
            try:
                engine.add(self._request(message), message.arrival_time)
            except ValueError as error:
                self._send(Refused(message.request_id, str(error)))
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                engine.abort(request_id)
        elif isinstance(message, Ping):
            self._send(self._pong(message.with_picture))
        elif message is None:
            self._is_stopped = True

    def _request(self, message: Add | Search) -> Request:
        if isinstance(message, Search):
            return self._engine.make_beam_request(
                message.request_id,
                message.prompt_token_ids,
                message.params,
                priority=message.priority,
                cache_salt=message.cache_salt,
            )
        return self._engine.make_request(
            message.request_id,
            message.prompt_token_ids,
            message.params,
            stream=message.stream,
            priority=message.priority,
            cache_salt=message.cache_salt,
        )

    def _pong(self, with_picture: bool) -> Pong:
        allocator = self._engine.scheduler.block_manager.allocator
        return Pong(
            self._engine.get_metrics(),
            allocator.num_cached,
            self._step_seconds,
            self._host_seconds,
            Picture(self._block_map(), list(self._steps)) if with_picture else None,
        )

    def _block_map(self) -> bytes:
        scheduler = self._engine.scheduler
        allocator = scheduler.block_manager.allocator
        cached = type(allocator.state(0)).CACHED
        stride = -(-allocator.num_blocks // PICTURE_BLOCKS)
        owners: dict[int, int] = {}
        for sequence in scheduler.running:
            owner = FIRST_OWNER + sequence.seq_id % NUM_OWNERS
            for block in sequence.held_blocks:
                owners[block] = SHARED if block in owners else owner
        return bytes(
            owners.get(block) or (CACHED if allocator.state(block) == cached else FREE)
            for block in range(0, allocator.num_blocks, stride)
        )


def delta_of(request: Request) -> RequestDelta:
    """What a request gained since the last call."""
    completions = []
    for index, completion in enumerate(request.results):
        sequence, told = completion.sequence, completion.num_told_tokens
        num_tokens, ended = sequence.num_output_tokens, sequence.is_finished
        if completion.is_told or (num_tokens == told and not ended):
            continue
        text = completion.text.text if ended else completion.text.settled_text
        completions.append(
            CompletionDelta(
                index,
                text[completion.num_told_chars :],
                sequence.token_ids[sequence.num_prompt_tokens + told :],
                sequence.output_logprobs[told:] if request.has_logprobs else None,
                sequence.finish_reason,
                sequence.stop_reason,
            )
        )
        completion.num_told_tokens, completion.num_told_chars = num_tokens, len(text)
        completion.is_told = ended
    is_told, request.is_told = request.is_told, True
    has_ended = request.metrics.finished_time is not None
    return RequestDelta(
        request.request_id,
        completions,
        has_ended,
        request.metrics if has_ended else None,
        request.num_cached_tokens if has_ended else 0,
        None if is_told else request.prompt_logprobs,
    )


def parts_of(delta: RequestDelta) -> Iterator[RequestDelta]:
    """Deltas that sum up to this one, with so few log-probabilities each that to decode it holds
    nobody up.
    """
    if delta.prompt_logprobs is not None:
        entries, delta.prompt_logprobs = delta.prompt_logprobs, None
        for start in range(0, len(entries), TOKENS_PER_MESSAGE):
            some = entries[start : start + TOKENS_PER_MESSAGE]
            yield RequestDelta(delta.request_id, [], False, prompt_logprobs=some, is_part=True)
    for completion in delta.completions:
        token_ids, logprobs = completion.token_ids, completion.logprobs
        if logprobs is None:
            continue
        completion.token_ids, completion.logprobs = [], []
        for start in range(0, len(token_ids), TOKENS_PER_MESSAGE):
            end = start + TOKENS_PER_MESSAGE
            part = CompletionDelta(completion.index, "", token_ids[start:end], logprobs[start:end])
            yield RequestDelta(delta.request_id, [part], False, is_part=True)
    yield delta


def serve_engine(connection: socket.socket) -> int:
    """Load what the first message says and work until the connection or the engine ends.

    Returns:
        the exit code.
    """
    stream = connection.makefile("rb")
    first = _read_message(stream)
    if not isinstance(first, Load):
        return 1
    inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
    outbox = Outbox(connection)
    threading.Thread(target=_read_into, args=(stream, inbox), daemon=True).start()
    exit_code = 1
    try:
        from nano_vllm.engine.engine import Engine

        engine = Engine.from_config(first.config)
        engine.number_from(first.first_seq_id)
        runner = engine.runner
        outbox.send(
            Ready(
                runner.model_config.vocab_size,
                runner.max_model_len,
                runner.num_blocks,
                runner.block_size,
                str(runner.device),
            )
        )
        gc.freeze()  # what is loaded stays: no collection need look at it, in the middle of a step
        EngineLoop(engine, inbox, outbox.send).run()
        engine.close()
        exit_code = 0
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        outbox.send(Failed(kind + " ".join(str(error).split())))
        if not isinstance(error, ValueError):
            sys.excepthook(*sys.exc_info())
    outbox.close(timeout=5)
    return exit_code


def _read_message(stream: BinaryIO) -> ToEngine | None:
    """The next message; None behind the last one."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    body = stream.read(length)
    return to_engine_decoder.decode(body) if len(body) == length else None


def _read_into(stream: BinaryIO, inbox: queue.SimpleQueue[ToEngine | None]) -> None:
    try:
        while (message := _read_message(stream)) is not None:
            inbox.put(message)
    except OSError:
        pass
    inbox.put(None)
    time.sleep(EXIT_SECONDS)  # a daemon's: the process has ended by then, unless a step hangs
    os._exit(1)


def main() -> int:
    # The terminal's Ctrl-C is for the API process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The API process sends this to an engine that is stuck.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    return serve_engine(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
