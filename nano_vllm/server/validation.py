"""The one gate between clients and the engine: a request becomes token ids and SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec

from nano_vllm.config import EngineConfig
from nano_vllm.engine.messages import Ready
from nano_vllm.engine.validation import RequestLimits
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.server.beams import beam_search_params
from nano_vllm.server.errors import ApiError, invalid
from nano_vllm.server.protocol import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    TemplateOptions,
    TokenizeRequest,
)
from nano_vllm.tokenizer.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
SHORT_TEXT = 256
"""Characters."""
SHORT_IDS = 2048
"""Tokens."""
MAX_CHARS_PER_TOKEN = 256
"""A text longer than this times the context is refused before it is tokenised."""
SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
)
"""Fields that a request shares with SamplingParams."""


@dataclass(frozen=True)
class GatedPrompt:
    """A prompt that can be served."""

    text: str | None
    """None where it came as token ids and nobody wants its text."""
    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    """What was asked for: 0 where `params`, which knows no 0, says 1."""
    beams: BeamSearchParams | None = None
    """How to search, where that is wanted; `params` then has n and logprobs alone to say."""

    @property
    def needs_engine(self) -> bool:
        return self.max_tokens > 0 or self.params.prompt_logprobs is not None


class Gate:
    """Checks requests; its methods take time and may run in any thread.

    Raises ApiError, naming the field, for what cannot be served.

    Args:
        tokenizer: None where the engine runs on token ids alone.
        ready: what the engine said of itself.
        config: its options.
        defaults: of the model's generation_config.json, by SamplingParams's names.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        ready: Ready,
        config: EngineConfig,
        defaults: Mapping[str, Any],
    ) -> None:
        self._tokenizer = tokenizer
        self.max_model_len = ready.max_model_len
        self._capacity = ready.num_blocks * ready.block_size
        self._vocab_size = ready.vocab_size
        self._limits = RequestLimits(ready.vocab_size, ready.max_model_len, tokenizer is not None)
        self._max_num_seqs = config.max_num_seqs
        self._by_priority = config.scheduling_policy == "priority"
        self._defaults = dict(defaults)

    def completion(self, request: CompletionRequest) -> list[GatedPrompt]:
        """The prompts of a completion request, in their order."""
        n = request.n or 1
        if request.stream and (request.best_of or n) > n:
            raise invalid(
                f"best_of must be n = {n} with stream, as the likeliest are known at the end "
                f"alone, got {request.best_of}",
                "best_of",
            )
        self._check(request)
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = DEFAULT_COMPLETION_TOKENS
        options: dict[str, Any] = {"logprobs": request.logprobs, "best_of": request.best_of}
        if request.echo and request.logprobs is not None:
            if request.prompt_logprobs not in (None, request.logprobs):
                raise invalid("prompt_logprobs must be logprobs, with echo", "prompt_logprobs")
            options["prompt_logprobs"] = request.logprobs
        prompts = _as_list(request.prompt)
        gated = []
        for prompt in prompts:
            if isinstance(prompt, str):
                token_ids = self.encode(prompt, request.add_special_tokens is not False)
                gated.append(self._gated(request, prompt, token_ids, max_tokens, options))
            else:
                item = self._gated(request, None, prompt, max_tokens, options)
                # Checked first, decoded then.
                gated.append(
                    replace(item, text=self.decode(prompt, "prompt")) if request.echo else item
                )
        return gated

    def chat(self, request: ChatRequest) -> GatedPrompt:
        """The prompt of a conversation."""
        self._check(request)
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        max_tokens = request.max_completion_tokens
        if max_tokens is None:
            max_tokens = request.max_tokens
        elif request.max_tokens not in (None, max_tokens):
            raise invalid("max_tokens and max_completion_tokens contradict", "max_tokens")
        options = {"logprobs": (request.top_logprobs or 0) if request.logprobs else None}
        text, token_ids = self.conversation(request)
        return self._gated(request, text, token_ids, max_tokens, options)

    def conversation(
        self, request: ChatRequest | TokenizeRequest | TemplateOptions
    ) -> tuple[str, list[int]]:
        """A conversation as the model reads it."""
        tokenizer = self.tokenizer("messages")
        messages = [_plain(message) for message in getattr(request, "messages", None) or []]
        self._check_length(sum(len(str(message["content"])) for message in messages), "messages")
        goes_on = bool(request.continue_final_message)
        opens = request.add_generation_prompt
        try:
            chat = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not goes_on if opens is None else opens,
                continue_final_message=goes_on,
                chat_template_kwargs=request.chat_template_kwargs,
            )
        except ValueError as error:
            raise _of_template(error) from None
        self._check_length(len(chat.text), "messages")
        try:
            return chat.text, tokenizer.encode_chat(chat)
        except ValueError as error:
            raise invalid(str(error), "messages") from None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt; one that is far too long is refused at once."""
        tokenizer = self.tokenizer("prompt")
        self._check_length(len(text), "prompt")
        try:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise invalid(str(error), "prompt") from None

    def _check_length(self, num_chars: int, field: str) -> None:
        """Of a text before it is rendered or tokenised, which takes its time."""
        if num_chars > self.max_model_len * MAX_CHARS_PER_TOKEN:
            raise invalid(
                f"the prompt has {num_chars} characters, more than the context of "
                f"{self.max_model_len} tokens can hold",
                field,
                "context_length_exceeded",
            )

    def decode(self, token_ids: list[int], field: str = "tokens") -> str:
        """The text of tokens that a client sent."""
        tokenizer = self.tokenizer(field)
        for place, token_id in enumerate(token_ids):
            if token_id >= self._vocab_size:
                raise invalid(
                    f"token ids must lie in [0, {self._vocab_size}), got {token_id} at "
                    f"position {place}",
                    field,
                )
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    def tokenizer(self, field: str) -> Tokenizer:
        """ApiError where there is none."""
        if self._tokenizer is None:
            raise invalid("this server has no tokenizer: give token ids as prompt", field)
        return self._tokenizer

    def _check(self, request: SamplingRequest) -> None:
        """What can be said ahead of the prompts."""
        if request.stream_options is not None and not request.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        if request.stream and request.prompt_logprobs is not None:
            raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
        if request.priority and not self._by_priority:
            raise invalid(
                f"priority needs a server with --scheduling-policy priority, "
                f"got {request.priority}",
                "priority",
            )

    def _gated(
        self,
        request: SamplingRequest,
        text: str | None,
        token_ids: list[int],
        max_tokens: int | None,
        options: dict[str, Any],
    ) -> GatedPrompt:
        room = self.max_model_len - len(token_ids)
        if room < 1 or (max_tokens is not None and max_tokens > room):
            asked = "" if max_tokens is None else f" and max_tokens asks for {max_tokens}"
            raise invalid(
                f"this model's context holds {self.max_model_len} tokens, but the prompt has "
                f"{len(token_ids)}{asked}",
                "messages" if isinstance(request, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        max_tokens = room if max_tokens is None else max_tokens
        if len(token_ids) + max_tokens > self._capacity:
            raise invalid(
                f"prompt and max_tokens are {len(token_ids) + max_tokens} tokens, but the KV "
                f"cache holds {self._capacity}",
                "max_tokens",
            )
        given = {name: getattr(request, name) for name in SAME_NAME}
        chosen = {
            **self._defaults,
            **{name: value for name, value in (given | options).items() if value is not None},
        }
        try:
            chosen["logit_bias"] = _biases(request.logit_bias)
            params = SamplingParams(**chosen, max_tokens=max(max_tokens, 1))
            self._limits.check(token_ids, params)
        except ValueError as error:
            raise _named(error) from None
        beams = beam_search_params(request, params, self._max_num_seqs)
        return GatedPrompt(text, token_ids, params, max_tokens, beams)


def _as_list(prompt: str | list[Any]) -> list[str | list[int]]:
    """One prompt or several; a list of numbers is one."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds <= {int}:
        return [prompt]
    if int in kinds:
        raise invalid("prompt must not mix token ids with prompts", "prompt")
    if len(prompt) > MAX_PROMPTS:
        raise invalid(
            f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}", "prompt"
        )
    return prompt


def _biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if not biases:
        return None
    for token_id in biases:
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) <= 10):
            raise ValueError(f"logit_bias must be by token id, got {token_id[:32]!r}")
    return {int(token_id): bias for token_id, bias in biases.items()}


def is_short(request: CompletionRequest) -> bool:
    """Whether the gate takes no longer than to ask a thread to do its work."""
    prompt = request.prompt
    if request.echo or request.bad_words or request.stop or not prompt:
        return False
    if isinstance(prompt, str):
        return len(prompt) <= SHORT_TEXT
    return isinstance(prompt[0], int) and len(prompt) <= SHORT_IDS


def _plain(message: Any) -> dict[str, Any]:
    """As templates know messages: without what is absent."""
    fields = {k: v for k, v in msgspec.to_builtins(message).items() if v is not None}
    if message.role == "developer":
        fields["role"] = "system"
    if message.content is None and not message.tool_calls:
        raise invalid(f"a message of role {message.role} must have content", "messages")
    fields.setdefault("content", "")
    return fields


def _of_template(error: ValueError) -> ApiError:
    """What a template, or the way it is called, has to complain of."""
    message = str(error)
    if message.startswith("chat template of "):
        # Behind the file's name, which is nobody's business.
        return invalid("chat template: " + message.partition(": ")[2], "messages")
    if message.endswith("give it a plain prompt"):
        return invalid("this model has no chat template: use /v1/completions", "messages")
    first = message.split()[0]
    is_field = first in ("chat_template_kwargs", "continue_final_message")
    return invalid(message, first if is_field else "messages")


_PARAMS = {f.name for f in fields(SamplingParams)}


def _named(error: ValueError) -> ApiError:
    """Messages of SamplingParams and RequestLimits begin with the field."""
    message = str(error)
    first = message.split()[0].partition("[")[0]
    return invalid(message, first if first in _PARAMS else "prompt")
