"""What clients may ask: the OpenAI API's requests, with vLLM's own fields.

A field that is not supported is here with the values that ask for nothing; any other is refused by
its name. Numbers have their bounds here, both sides, as far as no other value matters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nano_vllm.engine.validation import MAX_SALT_LENGTH

MAX_COUNT = 2**31 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_PROMPTS = 1024

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenIds = list[Count]
NoList = Annotated[list[Any], Meta(max_length=0)]
"""Asks for nothing."""


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of any kind: an unknown field is refused."""


class StreamOptions(Request, kw_only=True):
    include_usage: bool | None = None
    """A last chunk says how many tokens there were."""
    include_obfuscation: Literal[False] | None = None


class TextFormat(Request, kw_only=True):
    type: Literal["text"]


class SamplingRequest(Request, kw_only=True):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[TokenIds, Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)]
        | None
    ) = None
    allowed_token_ids: Annotated[TokenIds, Meta(min_length=1)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    """With the tokens of prompt and output."""
    timings: bool | None = None
    """With the milliseconds that the parts of the request took."""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    """The lowest goes first; other than 0 only with --scheduling-policy priority."""
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    """Cached blocks are shared with requests of the same salt alone."""
    use_beam_search: bool | None = None
    """Return the n likeliest completions that n beams find; nothing is drawn or streamed."""
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] | None = None
    """Of beams: log-probabilities are divided by the number of tokens to this power; 1 by default.
    """
    early_stopping: bool | Literal["never"] | None = None
    """Of beams: whether n that have ended are enough, false by default; "never" goes on until no
    better one can come.
    """
    # They tell whose request it is, and change nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    # Not supported, but for what asks for nothing.
    response_format: TextFormat | None = None
    structured_outputs: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    logits_processors: NoList | None = None
    truncate_prompt_tokens: None = None
    spaces_between_special_tokens: bool | None = None
    kv_transfer_params: None = None
    vllm_xargs: None = None


class CompletionRequest(SamplingRequest, kw_only=True):
    """Continue a text."""

    prompt: (
        str
        | Annotated[list[str | int | Annotated[TokenIds, Meta(min_length=1)]], Meta(min_length=1)]
    )
    """A text, token ids, or a list of either."""
    max_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    """The prompt comes first."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts what the model expects around a text, such as BOS."""
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    """Completions to generate, of which the n likeliest are returned; n by default. Not streamed
    where it is more than n.
    """
    suffix: Literal[""] | None = None
    prompt_embeds: None = None


class TextPart(Request, kw_only=True):
    type: Literal["text"]
    text: str


class Function(Request, kw_only=True):
    name: str
    arguments: str


class ToolCall(Request, kw_only=True):
    id: str
    type: Literal["function"]
    function: Function


class Message(Request, kw_only=True):
    """One of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: NoList | None = None


TemplateVariables = dict[str, str | int | float | bool | None]
Messages = Annotated[list[Message], Meta(min_length=1)]


class TemplateOptions(Request, kw_only=True):
    """How a conversation becomes a prompt, by the model's chat template."""

    add_generation_prompt: bool | None = None
    """Whether to open the assistant's answer; true by default."""
    continue_final_message: bool | None = None
    """Whether the last message goes on instead."""
    chat_template_kwargs: TemplateVariables | None = None
    """More variables of the template."""
    chat_template: None = None
    documents: NoList | None = None


class ChatRequest(SamplingRequest, kw_only=True):
    """Answer a conversation."""

    messages: Messages
    # As in TemplateOptions: structs have one base.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    chat_template: None = None
    documents: NoList | None = None
    max_tokens: Count | None = None
    """By default as many as the context holds."""
    max_completion_tokens: Count | None = None
    """The same."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    tools: NoList | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    include_reasoning: bool | None = None
    verbosity: None = None
    mm_processor_kwargs: None = None


class TokenizeRequest(TemplateOptions, kw_only=True):
    """Token ids of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Of a text: whether to add what the model expects around it, such as BOS."""
    return_token_strs: bool | None = None
    tools: NoList | None = None


class DetokenizeRequest(Request, kw_only=True):
    """The text of tokens."""

    model: str | None = None
    tokens: TokenIds
