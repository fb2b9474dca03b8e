"""Answers of /v1/chat/completions."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from nano_vllm.engine.messages import CompletionDelta, RequestDelta
from nano_vllm.logprob import Logprob
from nano_vllm.server.answer import Answer, drained, prompt_entries, token_text
from nano_vllm.server.event import encoded
from nano_vllm.server.protocol import ChatRequest
from nano_vllm.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
)
from nano_vllm.server.validation import GatedPrompt


class ChatAnswer(Answer):
    """Messages of the assistant."""

    request: ChatRequest

    def __init__(self, request: ChatRequest, prompt: GatedPrompt, model: str) -> None:
        super().__init__(request, [prompt], model, "chatcmpl-")
        self._begun: set[int] = set()
        """Choices whose role was told."""

    def chunks(
        self,
        place: int,
        completion: CompletionDelta,
        prompt_logprobs: list[dict[int, Logprob] | None] | None,
    ) -> list[msgspec.Struct]:
        responses: list[msgspec.Struct] = []
        index = completion.index
        if index not in self._begun:
            first = self._response(
                [ChatChunkChoice(index, ChatDelta(role="assistant", content=""))]
            )
            if self.request.return_token_ids and not self._begun:
                first.prompt_token_ids = self.prompts[0].token_ids
            self._begun.add(index)
            responses.append(first)
        choice = ChatChunkChoice(
            index,
            ChatDelta(content=completion.text) if completion.text else ChatDelta(),
            self._logprobs(completion),
            completion.finish_reason,
        )
        if completion.finish_reason is not None:
            choice.stop_reason = completion.stop_reason
        if self.request.return_token_ids:
            choice.token_ids = completion.token_ids
        return [*responses, self._response([choice])]

    def last_chunk(self) -> msgspec.Struct | None:
        if not self.include_usage and not self.request.timings:
            return None
        response = self._response([])
        if self.include_usage:
            response.usage = self.usage
        response.timings = self.timings
        return response

    def whole(self, deltas: dict[int, RequestDelta]) -> msgspec.Struct:
        delta = deltas[0]
        choices = [
            ChatChoice(
                completion.index,
                ChatMessage("assistant", completion.text),
                self._logprobs(completion),
                completion.finish_reason,
                completion.stop_reason,
                completion.token_ids if self.request.return_token_ids else UNSET,
            )
            for completion in drained(delta.completions)
        ]
        response = ChatCompletion(
            self.id, self.created, self.model, choices, self.usage, timings=self.timings
        )
        if self.request.return_token_ids:
            response.prompt_token_ids = self.prompts[0].token_ids
        if delta.prompt_logprobs is not None:
            response.prompt_logprobs = prompt_entries(delta.prompt_logprobs)
        return response

    def _response(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        response = ChatChunk(self.id, self.created, self.model, choices)
        if self.include_usage:
            response.usage = None
        return response

    def _logprobs(self, completion: CompletionDelta) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        most = self.request.top_logprobs or 0
        content = []
        for token_id, entry in zip(completion.token_ids, completion.logprobs or [], strict=True):
            likeliest = sorted(entry.items(), key=lambda item: -item[1].logprob)[:most]
            content.append(
                encoded(
                    ChatLogprob(
                        *_named(token_id, entry[token_id]),
                        [TopLogprob(*_named(i, e)) for i, e in likeliest],
                    )
                )
            )
        return ChatLogprobs(content)


def _named(token_id: int, entry: Logprob) -> tuple[str, float, list[int]]:
    text = token_text(token_id, entry)
    return text, entry.logprob, list(text.encode())
