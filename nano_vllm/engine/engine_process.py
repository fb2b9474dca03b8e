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
from collections.abc import Callable
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
    encode,
    to_engine_decoder,
)

if TYPE_CHECKING:
    from nano_vllm.engine.engine import Engine
    from nano_vllm.engine.request import Request
    from nano_vllm.outputs import RequestOutput

PICTURE_BLOCKS = 2048
PICTURE_STEPS = 120
EXIT_SECONDS = 10
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
        self._sent: dict[str, dict[int, tuple[int, int] | None]] = {}
        """By request and completion: characters and tokens that were reported; None for all."""
        self._steps: deque[StepNote] = deque(maxlen=PICTURE_STEPS)
        self._step_seconds = 0.0
        self._host_seconds = 0.0
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
            outputs = self._engine.step()
            end = self._clock()
            self._step_seconds += end - start
            deltas = [self._delta(output) for output in outputs]
            if deltas:
                self._send(Deltas(deltas))
            num_running = self._engine.get_metrics().num_running
            num_tokens = sum(delta.num_tokens for delta in deltas)
            self._steps.append(StepNote(end, end - start, num_running, num_tokens))

    def _handle(self, message: ToEngine | None) -> None:
        engine = self._engine
        if isinstance(message, (Add, Search)):
            try:
                engine.add(self._request(message))
            except ValueError as error:
                self._send(Refused(message.request_id, str(error)))
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                engine.abort(request_id)
                self._sent.pop(request_id, None)
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

    def _delta(self, output: RequestOutput) -> RequestDelta:
        is_first = output.request_id not in self._sent
        sent = self._sent.setdefault(output.request_id, {})
        completions = []
        for completion in output.outputs:
            reported = sent.get(completion.index, (0, 0))
            if reported is None:
                continue
            num_chars, num_tokens = reported
            if num_tokens == len(completion.token_ids) and not completion.finished:
                continue
            logprobs = completion.logprobs
            completions.append(
                CompletionDelta(
                    completion.index,
                    completion.text[num_chars:],
                    completion.token_ids[num_tokens:],
                    None if logprobs is None else logprobs[num_tokens:],
                    completion.finish_reason,
                    completion.stop_reason,
                )
            )
            so_far = (len(completion.text), len(completion.token_ids))
            sent[completion.index] = None if completion.finished else so_far
        if output.finished:
            del self._sent[output.request_id]
        return RequestDelta(
            output.request_id,
            completions,
            output.finished,
            output.metrics if output.finished else None,
            output.num_cached_tokens if output.finished else 0,
            output.prompt_logprobs if is_first else None,
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
    outbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
    threading.Thread(target=_read_into, args=(stream, inbox), daemon=True).start()
    writer = threading.Thread(target=_write_from, args=(outbox, connection), daemon=True)
    writer.start()
    exit_code = 1
    try:
        from nano_vllm.engine.engine import Engine

        engine = Engine.from_config(first.config)
        engine.number_from(first.first_seq_id)
        runner = engine.runner
        outbox.put(
            Ready(
                runner.model_config.vocab_size,
                runner.max_model_len,
                runner.num_blocks,
                runner.block_size,
                str(runner.device),
            )
        )
        gc.freeze()  # what is loaded stays: no collection need look at it, in the middle of a step
        EngineLoop(engine, inbox, outbox.put).run()
        engine.close()
        exit_code = 0
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        outbox.put(Failed(kind + " ".join(str(error).split())))
        if not isinstance(error, ValueError):
            sys.excepthook(*sys.exc_info())
    outbox.put(None)
    writer.join(timeout=5)
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


def _write_from(outbox: queue.SimpleQueue[FromEngine | None], connection: socket.socket) -> None:
    """Send messages, those that came meanwhile together."""
    while True:
        messages = [outbox.get()]
        while not outbox.empty():
            messages.append(outbox.get())
        try:
            connection.sendall(encode(message for message in messages if message is not None))
        except OSError:
            return
        if messages[-1] is None:
            return


def main() -> int:
    # The terminal's Ctrl-C is for the API process, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The API process sends this to an engine that is stuck.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    return serve_engine(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
