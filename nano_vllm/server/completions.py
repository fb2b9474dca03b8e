"""Answers of /v1/completions."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from nano_vllm.engine.messages import CompletionDelta, RequestDelta
from nano_vllm.logprob import Logprob
from nano_vllm.server.answer import Answer, drained, prompt_entries, token_text
from nano_vllm.server.event import encoded
from nano_vllm.server.protocol import CompletionRequest
from nano_vllm.server.responses import Completion, CompletionChoice, CompletionLogprobs
from nano_vllm.server.validation import GatedPrompt
from nano_vllm.tokenizer.tokenizer import Tokenizer


class CompletionAnswer(Answer):
    """Texts that go on, one choice for each prompt and completion.

    Args:
        request: what was asked.
        prompts: what the gate made of it.
        model: its name for the client.
        tokenizer: names the first token of a prompt.
    """

    request: CompletionRequest

    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[GatedPrompt],
        model: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        super().__init__(request, prompts, model, "cmpl-")
        self._tokenizer = tokenizer
        self._num_chars: dict[int, int] = {}
        """By choice that has begun: characters of its tokens so far."""
        self._prompt_logprobs: dict[int, list[dict[int, Logprob] | None]] = {}
        """By prompt: they come once, for all its choices."""

    def chunks(
        self,
        place: int,
        completion: CompletionDelta,
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
    ) -> list[msgspec.Struct]:
        return [self._response([self._choice(place, completion, prompt_logprobs)])]

    def last_chunk(self) -> msgspec.Struct | None:
        if not self.include_usage and not self.request.timings:
            return None
        return self._response([], is_last=True)

    def whole(self, deltas: dict[int, RequestDelta]) -> msgspec.Struct:
        choices = [
            self._choice(place, completion, delta.prompt_logprobs)
            for place, delta in sorted(deltas.items())
            for completion in drained(delta.completions)
        ]
        return Completion(
            self.id, self.created, self.model, choices, usage=self.usage, timings=self.timings
        )

    def _response(self, choices: list[CompletionChoice], is_last: bool = False) -> Completion:
        response = Completion(self.id, self.created, self.model, choices)
        if self.include_usage:
            response.usage = self.usage if is_last else None
        if is_last:
            response.timings = self.timings
        return response

    def _choice(
        self,
        place: int,
        completion: CompletionDelta,
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
    ) -> CompletionChoice:
        request, prompt = self.request, self.prompts[place]
        if prompt_logprobs is not None:
            self._prompt_logprobs[place] = prompt_logprobs
        index = place * prompt.params.n + completion.index
        begins = index not in self._num_chars
        num_chars = self._num_chars.setdefault(index, 0)
        echoes = bool(request.echo) and begins
        choice = CompletionChoice(
            index,
            (prompt.text or "") + completion.text if echoes else completion.text,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        if request.logprobs is not None:
            ids = list(completion.token_ids)
            entries: list[dict[int, Logprob] | None] = list(completion.logprobs or [])
            if echoes:
                ids = prompt.token_ids + ids
                entries = list(self._prompt_logprobs[place]) + entries
            choice.logprobs = self._logprobs(ids, entries, num_chars)
            self._num_chars[index] += sum(map(len, choice.logprobs.tokens))
        if request.prompt_logprobs is not None and prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_entries(prompt_logprobs)
        if request.return_token_ids:
            choice.token_ids = completion.token_ids
            choice.prompt_token_ids = prompt.token_ids if begins else UNSET
        return choice

    def _logprobs(
        self, token_ids: list[int], entries: list[dict[int, Logprob] | None], offset: int
    ) -> CompletionLogprobs:
        result = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            if entry is None:  # nothing predicts the first token
                text = self._tokenizer.token_text(token_id) if self._tokenizer else ""
            else:
                text = token_text(token_id, entry[token_id])
            result.tokens.append(text)
            result.token_logprobs.append(None if entry is None else entry[token_id].logprob)
            result.top_logprobs.append(
                None
                if entry is None
                else encoded({token_text(i, e): e.logprob for i, e in entry.items()})
            )
            result.text_offset.append(offset)
            offset += len(text)
        return result
