"""What the API process and the engine process say to each other: fixed structs as MessagePack, each
behind its length, over a Unix socket.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec

from nano_vllm.config import EngineConfig
from nano_vllm.logprob import Logprob
from nano_vllm.metrics import EngineMetrics
from nano_vllm.outputs import RequestMetrics
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams

LENGTH = struct.Struct(">I")
"""Of the message that follows, in bytes."""


class Load(msgspec.Struct, tag=True, array_like=True):
    """The first message to the engine."""

    config: EngineConfig
    first_seq_id: int = 0
    """Sequences are numbered from here on."""


class Add(msgspec.Struct, tag=True, array_like=True):
    """A request that passed the gate."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    stream: bool
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float | None = None
    """When the server had it, in seconds of the monotonic clock, which a host's processes share."""


class Search(msgspec.Struct, tag=True, array_like=True):
    """A beam search that passed the gate."""

    request_id: str
    prompt_token_ids: list[int]
    params: BeamSearchParams
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float | None = None


class Abort(msgspec.Struct, tag=True, array_like=True):
    """End these requests where they are; those that ended meanwhile do not matter."""

    request_ids: list[str]


class Ping(msgspec.Struct, tag=True, array_like=True):
    """Asks for a sign of life."""

    with_picture: bool = False


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The model is loaded."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    device: str


class Failed(msgspec.Struct, tag=True, array_like=True):
    """The last message of an engine that cannot go on."""

    message: str


class Refused(msgspec.Struct, tag=True, array_like=True):
    """A request that cannot be served after all."""

    request_id: str
    message: str


class CompletionDelta(msgspec.Struct, array_like=True, gc=False):
    """What one completion gained."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def absorb(self, later: CompletionDelta) -> None:
        """Become the sum of both."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class RequestDelta(msgspec.Struct, array_like=True, gc=False):
    """What one request gained."""

    request_id: str
    completions: list[CompletionDelta]
    finished: bool
    metrics: RequestMetrics | None = None
    """With the last delta alone, as is the next."""
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """With the first delta alone."""
    is_part: bool = False
    """Whether the rest of the delta is still to come, and nobody reads this before."""

    def absorb(self, later: RequestDelta) -> None:
        """Become the sum of both."""
        own = {delta.index: delta for delta in self.completions}
        for delta in later.completions:
            if delta.index in own:
                own[delta.index].absorb(delta)
            else:
                self.completions.append(delta)
        self.finished, self.metrics = later.finished, later.metrics
        self.num_cached_tokens, self.is_part = later.num_cached_tokens, later.is_part
        if self.prompt_logprobs is None:
            self.prompt_logprobs = later.prompt_logprobs
        else:
            self.prompt_logprobs += later.prompt_logprobs or ()

    @property
    def num_tokens(self) -> int:
        count = 0
        for delta in self.completions:
            count += len(delta.token_ids)
        return count

    @property
    def size(self) -> int:
        """Tokens that may have log-probabilities, of output and prompt."""
        return self.num_tokens + len(self.prompt_logprobs or ())


class Deltas(msgspec.Struct, tag=True, array_like=True):
    """What a step brought."""

    requests: list[RequestDelta]


class StepNote(msgspec.Struct, array_like=True):
    """One step, for the picture."""

    end: float
    """Seconds of the monotonic clock."""
    seconds: float
    num_running: int
    num_tokens: int
    """Output tokens reported; tokens of requests that are not streamed count when they end."""


class Picture(msgspec.Struct, array_like=True):
    """The engine at one moment, for people to look at."""

    blocks: bytes
    """A byte a block, of evenly chosen ones where there are many: FREE, CACHED, SHARED, or from
    FIRST_OWNER on a number of the sequence that holds it.
    """
    steps: list[StepNote]
    """The last ones."""


FREE, CACHED, SHARED, FIRST_OWNER = range(4)


class Pong(msgspec.Struct, tag=True, array_like=True):
    """A sign of life."""

    metrics: EngineMetrics
    num_cached_blocks: int
    step_seconds: float
    """Time in steps since the start."""
    host_seconds: float
    """Time between steps that followed one another at once: what the device waits for besides."""
    picture: Picture | None = None


ToEngine = Load | Add | Search | Abort | Ping
FromEngine = Ready | Failed | Refused | Deltas | Pong

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode(messages: Iterable[ToEngine | FromEngine]) -> bytes:
    """The messages as they go over the socket."""
    bodies = map(_encoder.encode, messages)
    return b"".join(part for body in bodies for part in (LENGTH.pack(len(body)), body))
