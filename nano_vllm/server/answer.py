"""From what the engine reports to what a client is told: what completions and chats share."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import msgspec

from nano_vllm.engine.messages import CompletionDelta, RequestDelta
from nano_vllm.logprob import Logprob
from nano_vllm.outputs import RequestMetrics
from nano_vllm.server.event import EventTemplate, encoded, event
from nano_vllm.server.protocol import SamplingRequest
from nano_vllm.server.responses import (
    PromptLogprobs,
    PromptTokensDetails,
    Timings,
    TokenEntry,
    Usage,
)
from nano_vllm.server.validation import GatedPrompt


class Answer(ABC):
    """One response in the making.

    Args:
        request: what was asked.
        prompts: what the gate made of it.
        model: its name for the client.
        prefix: of the response's id.
    """

    def __init__(
        self, request: SamplingRequest, prompts: list[GatedPrompt], model: str, prefix: str
    ) -> None:
        self.request = request
        self.prompts = prompts
        self.model = model
        self.id = prefix + secrets.token_hex(16)
        self.created = int(time.time())
        self.metrics: RequestMetrics | None = None
        """Of the last prompt that ended."""
        self.output_tokens = [0] * len(prompts)
        """By prompt, of all its completions."""
        self.num_cached_tokens = 0
        self._templates: dict[tuple[int, int], EventTemplate] = {}
        """By prompt and completion, of a chunk that brings text and nothing else."""
        options = request.stream_options
        self.include_usage = bool(options and options.include_usage)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_tokens)

    def note(self, place: int, delta: RequestDelta) -> None:
        """Count what came; where no output was asked for, drop it."""
        if self.prompts[place].max_tokens == 0:
            for completion in delta.completions:
                completion.text, completion.token_ids = "", []
                completion.logprobs = [] if completion.logprobs is not None else None
                completion.finish_reason, completion.stop_reason = "length", None
        self.output_tokens[place] += delta.num_tokens
        if delta.finished:
            self.metrics = delta.metrics
            self.num_cached_tokens += delta.num_cached_tokens

    def without_engine(self) -> list[tuple[int, RequestDelta]]:
        """The deltas of prompts for which nothing is to be computed."""
        return [
            (
                place,
                RequestDelta(
                    "",
                    [
                        CompletionDelta(i, "", [], None if p.params.logprobs is None else [])
                        for i in range(p.params.n)
                    ],
                    True,
                    RequestMetrics(),
                ),
            )
            for place, p in enumerate(self.prompts)
            if not p.needs_engine
        ]

    @property
    def usage(self) -> Usage:
        return Usage(
            self.num_prompt_tokens,
            self.num_output_tokens,
            self.num_prompt_tokens + self.num_output_tokens,
            PromptTokensDetails(self.num_cached_tokens),
        )

    @property
    def timings(self) -> Timings | msgspec.UnsetType:
        """Of the prompt that ended last, where asked for."""
        metrics = self.metrics
        if not self.request.timings or metrics is None:
            return msgspec.UNSET
        now = time.monotonic()
        start = metrics.arrival_time
        scheduled = metrics.first_scheduled_time or start
        first = metrics.first_token_time or scheduled
        end = metrics.finished_time or first
        return Timings(
            (scheduled - start) * 1e3,
            (first - scheduled) * 1e3,
            (end - first) * 1e3,
            max(0.0, now - end) * 1e3 if start else 0.0,
            metrics.num_preemptions,
        )

    def events(self, place: int, delta: RequestDelta) -> bytes:
        """What a stream sends for a delta that was noted."""
        parts = []
        for completion in delta.completions:
            key = place, completion.index
            template = self._templates.get(key)
            if template is not None and completion.text and completion.finish_reason is None:
                parts.append(template.filled(completion.text))
                continue
            parts += map(event, self.chunks(place, completion, delta.prompt_logprobs))
            params = self.prompts[place].params
            if template is None and params.logprobs is None and not self.request.return_token_ids:
                text = secrets.token_hex(16)
                (chunk,) = self.chunks(place, CompletionDelta(completion.index, text, []), None)
                self._templates[key] = EventTemplate(event(chunk), text)
        return b"".join(parts)

    @abstractmethod
    def chunks(
        self,
        place: int,
        completion: CompletionDelta,
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
    ) -> list[msgspec.Struct]:
        """What a stream sends for what a completion gained.

        Args:
            place: of its prompt.
            completion: what it gained.
            prompt_logprobs: where they came with it.
        """

    @abstractmethod
    def last_chunk(self) -> msgspec.Struct | None:
        """What a stream sends behind all choices."""

    @abstractmethod
    def whole(self, deltas: dict[int, RequestDelta]) -> msgspec.Struct:
        """The response to a request that is not streamed.

        Args:
            deltas: by prompt, all that it gained; without completions afterwards.
        """


def drained(completions: list[CompletionDelta]) -> Iterator[CompletionDelta]:
    """These by index, which the list no longer has: each is freed when the next one comes, as to
    free much in one go holds up all other threads.
    """
    completions.sort(key=lambda completion: -completion.index)
    while completions:
        yield completions.pop()


def token_text(token_id: int, entry: Logprob) -> str:
    """How a token is called in log-probabilities."""
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def prompt_entries(logprobs: Iterable[dict[int, Logprob] | None]) -> PromptLogprobs:
    """vLLM's form of a prompt's log-probabilities."""
    return [
        None
        if entries is None
        else encoded(
            {str(i): TokenEntry(e.logprob, e.rank, e.decoded_token) for i, e in entries.items()}
        )
        for entries in logprobs
    ]
