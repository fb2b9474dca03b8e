"""The front door for offline use: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from nano_vllm.config import DEFAULT_MODEL, EngineConfig
from nano_vllm.engine.engine import Engine
from nano_vllm.engine.interrupts import InterruptsWait
from nano_vllm.engine.prompts import (
    Prompt,
    as_prompt_list,
    cache_salt_of,
    join_prompts,
    parse_prompt,
)
from nano_vllm.engine.request import Request
from nano_vllm.engine.session import Session
from nano_vllm.engine.validation import check_cache_salt
from nano_vllm.metrics import EngineMetrics
from nano_vllm.outputs import RequestOutput, ScoreOutput
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model ready to generate. A context manager: leaving it gives all memory back.

    Args:
        model: a Hugging Face folder, a .gguf file or a hub id.
        use_tqdm_on_load: show a bar while the weights load.
        options: the other fields of EngineConfig.
    """

    def __init__(
        self, model: str = DEFAULT_MODEL, *, use_tqdm_on_load: bool = False, **options: Any
    ) -> None:
        if "data_parallel_size" in options:
            raise ValueError(
                "data_parallel_size is an option of the server; for a batch over several GPUs see "
                "docs/deployment/ray_batch.py"
            )
        config = EngineConfig.from_options({"model": model, **options})
        self._use(Engine.from_config(config, progress=use_tqdm_on_load))

    @classmethod
    def from_engine(cls, engine: Engine) -> LLM:
        """The same door to an engine that exists already."""
        llm = cls.__new__(cls)
        llm._use(engine)
        return llm

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self._num_requests = 0
        self._streamed: set[str] = set()
        """Requests of all streams that are open."""
        self._untaken: list[RequestOutput] = []
        """What a stream's step has reported to others."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete each prompt.

        Every prompt is checked before any work begins: ValueError names the first that cannot be
        served, and none is.

        Args:
            prompts: one or a list; each a string, a list of token ids, {"prompt": str} or
                {"prompt_token_ids": [int, ...]}. A list of integers is one prompt. With a
                "cache_salt" beside it, a prompt finds the cached blocks of equal salts alone.
            sampling_params: for all, or a list with one for each; by default SamplingParams().
            use_tqdm: show a progress bar.
            priority: for all, or a list with one for each: the lowest first. Other than 0 only
                under scheduling_policy priority.

        Returns:
            one result per prompt, in their order.
        """
        prompt_list = as_prompt_list(prompts)
        priorities = (
            list(priority) if isinstance(priority, Sequence) else [priority] * len(prompt_list)
        )
        if len(priorities) != len(prompt_list):
            raise ValueError(
                f"priority must have one entry for each of the {len(prompt_list)} prompts, "
                f"got {len(priorities)}"
            )
        requests = []
        for index, (prompt, params, rank) in enumerate(
            zip(prompt_list, _one_each(sampling_params, len(prompt_list)), priorities, strict=True)
        ):
            try:
                requests.append(self.make_request(prompt, params, priority=rank))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return self.run(requests, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The likeliest completions of each prompt that a beam search finds.

        Every prompt is checked before any work begins: ValueError names the first that cannot be
        served, and none is.

        Args:
            prompts: one or a list, in the forms of `generate`.
            params: for all.
            use_tqdm: show a progress bar.

        Returns:
            one result per prompt, in their order; its outputs, params.n at the most, best first,
            with their cumulative_logprob.
        """
        requests = []
        for index, prompt in enumerate(as_prompt_list(prompts)):
            try:
                text, token_ids = parse_prompt(prompt, self.engine.tokenizer)
                salt = cache_salt_of(prompt)
                requests.append(
                    self.engine.make_beam_request(
                        self._next_id(), token_ids, params, text, cache_salt=salt
                    )
                )
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return self.run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list, through the model's chat template.

        Every conversation is checked before any work begins: ValueError names the first that cannot
        be served, and none is.

        Args:
            messages: {"role": ..., "content": ...} each, or lists of them.
            sampling_params: as in `generate`.
            use_tqdm: show a progress bar.
            add_generation_prompt: open the assistant's answer.
            continue_final_message: go on with the last message instead, which needs
                add_generation_prompt=False.
            tools: descriptions of functions, for templates that know tools; for all conversations,
                as what follows.
            documents: for templates that know documents.
            chat_template_kwargs: other variables of the template, such as enable_thinking.
            parse_special: whether names of special tokens in all these become the tokens, instead
                of text.
        """
        if not isinstance(messages, list | tuple):
            raise ValueError(f"messages must be a list, got {messages!r:.100}")
        one = all(isinstance(message, Mapping) for message in messages)
        conversations: list[Any] = [messages] if one else list(messages)
        requests = []
        for index, (conversation, params) in enumerate(
            zip(conversations, _one_each(sampling_params, len(conversations)), strict=True)
        ):
            try:
                requests.append(
                    self.make_chat_request(
                        conversation,
                        params,
                        parse_special=parse_special,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=continue_final_message,
                        tools=tools,
                        documents=documents,
                        chat_template_kwargs=chat_template_kwargs,
                    )
                )
            except ValueError as error:
                raise ValueError(f"conversation {index}: {error}") from None
        return self.run(requests, use_tqdm)

    def score(
        self,
        contexts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
    ) -> list[ScoreOutput]:
        """Log-probabilities of each continuation behind its context, for evaluation harnesses.

        A context and its continuation, if both are texts, are tokenized as one text, and the tokens
        behind as many as the context alone has are the continuation's. Every pair is checked before
        any work begins; ValueError names the first that cannot be served.

        Args:
            contexts: one or a list, in the forms of `generate`; a "cache_salt" counts for the pair.
            continuations: as many, of the same form, with at least one token each.
            use_tqdm: show a progress bar.

        Returns:
            one result per pair, in their order.
        """
        context_list, continuation_list = as_prompt_list(contexts), as_prompt_list(continuations)
        if len(context_list) != len(continuation_list):
            raise ValueError(
                f"continuations must be as many as the {len(context_list)} contexts, "
                f"got {len(continuation_list)}"
            )
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        requests, starts = [], []
        for index, pair in enumerate(zip(context_list, continuation_list, strict=True)):
            try:
                token_ids, start = join_prompts(*pair, self.engine.tokenizer)
                salt = cache_salt_of(pair[0])
                requests.append(self._request(None, token_ids, params, False, 0, salt))
            except ValueError as error:
                raise ValueError(f"pair {index}: {error}") from None
            starts.append(start)
        return [
            _score(output, start)
            for output, start in zip(self.run(requests, use_tqdm), starts, strict=True)
        ]

    def session(self, prompt: Prompt) -> Session:
        """A text to go on from again and again: grow it, fork it, roll it back.

        Args:
            prompt: how it begins, in the forms of `generate`.
        """
        _, token_ids = parse_prompt(prompt, self.engine.tokenizer)
        salt = check_cache_salt(cache_salt_of(prompt))
        self.check_tokens(token_ids)
        return Session(self, token_ids, salt)

    def generate_sessions(
        self,
        sessions: Sequence[Session],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Go on with each session, all in one batch; each then ends with what was generated.

        Every session is checked before any work begins: ValueError names the first that cannot be
        served, and none is.

        Args:
            sessions: each comes once.
            sampling_params: for all, or a list with one for each; n is 1.
            use_tqdm: show a progress bar.

        Returns:
            one result per session, in their order.
        """
        if not isinstance(sessions, list | tuple) or not all(
            isinstance(session, Session) for session in sessions
        ):
            raise ValueError(f"sessions must be a list of sessions, got {sessions!r:.100}")
        if len(set(map(id, sessions))) < len(sessions):
            raise ValueError("a session comes twice; fork it")
        requests = []
        for index, (session, params) in enumerate(
            zip(sessions, _one_each(sampling_params, len(sessions)), strict=True)
        ):
            try:
                requests.append(self._session_request(session, params))
            except ValueError as error:
                raise ValueError(f"session {index}: {error}") from None
        grown = {r.request_id: s for r, s in zip(requests, sessions, strict=True)}
        return self.run(
            requests, use_tqdm, lambda o: grown[o.request_id].extend(o.outputs[0].token_ids)
        )

    def check_tokens(self, token_ids: list[int]) -> None:
        """ValueError for what could not be the tokens of a prompt."""
        self.engine.make_request("", token_ids, SamplingParams(max_tokens=1, detokenize=False))

    def compute(self, token_ids: list[int], cache_salt: str | None = None) -> None:
        """Fill the prefix cache with a prompt."""
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self.run([self._request(None, token_ids, params, False, 0, cache_salt)], use_tqdm=False)

    def make_request(
        self, prompt: Prompt, params: SamplingParams, stream: bool = False, priority: int = 0
    ) -> Request:
        """A checked request for `run`; ValueError if it cannot be served."""
        text, token_ids = parse_prompt(prompt, self.engine.tokenizer)
        return self._request(text, token_ids, params, stream, priority, cache_salt_of(prompt))

    def make_chat_request(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        stream: bool = False,
        parse_special: bool = False,
        **options: Any,
    ) -> Request:
        """The same for a conversation; `options` are those of `Tokenizer.apply_chat_template`."""
        tokenizer = self.get_tokenizer()
        chat = tokenizer.apply_chat_template(messages, **options)
        token_ids = tokenizer.encode_chat(chat, parse_special)
        return self._request(chat.text, token_ids, params, stream)

    def run(
        self,
        requests: list[Request],
        use_tqdm: bool = True,
        on_finish: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Work on all requests until they are done; results in their order.

        Args:
            requests: from `make_request`.
            use_tqdm: show a progress bar.
            on_finish: called with each result as it comes.
        """
        from tqdm import tqdm

        results: dict[str, RequestOutput] = {}
        num_output_tokens = 0
        with tqdm(
            total=len(requests), desc="Generating", unit="prompt", disable=not use_tqdm
        ) as bar:
            for output in self.stream(requests):
                if output.finished:
                    results[output.request_id] = output
                    if on_finish is not None:
                        on_finish(output)
                    num_output_tokens += sum(len(c.token_ids) for c in output.outputs)
                    bar.set_postfix_str(f"{num_output_tokens} tokens", refresh=False)
                    bar.update()
        return [results[request.request_id] for request in requests]

    def stream(self, requests: list[Request]) -> Iterator[RequestOutput]:
        """Work on all requests; what there is to report of them, as it comes.

        Several may be open at a time, and other work be done between two outputs. If one is broken
        off, by an error, an interrupt or the caller, none of its requests stays in the engine; an
        interrupt counts behind the step that it comes in.
        """
        unfinished = {request.request_id for request in requests}
        self._streamed |= unfinished
        try:
            with InterruptsWait():
                for request in requests:
                    self.engine.add(request)
            while unfinished:
                mine = self._take(unfinished)
                if not mine:
                    with InterruptsWait():
                        self._untaken += self.engine.step()
                for output in mine:
                    if output.finished:
                        unfinished.discard(output.request_id)
                    yield output
        finally:
            with InterruptsWait():
                for request_id in unfinished:
                    self.engine.abort(request_id)
                self._take(unfinished)
                self._streamed.difference_update(request.request_id for request in requests)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ValueError where the engine runs on token ids alone."""
        if self.engine.tokenizer is None:
            raise ValueError("there is no tokenizer: the engine runs with skip_tokenizer_init")
        return self.engine.tokenizer

    def get_metrics(self) -> EngineMetrics:
        """Counters since the start, and how full the engine is now."""
        return self.engine.get_metrics()

    def close(self) -> None:
        """Give all memory back; the model cannot generate any more."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        stream: bool,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        return self.engine.make_request(
            self._next_id(), token_ids, params, text, stream, priority, cache_salt
        )

    def _session_request(self, session: Session, params: SamplingParams) -> Request:
        session.check_open()
        session.check_belongs_to(self)
        request = self._request(None, session.token_ids, params, False, 0, session.cache_salt)
        if len(request.completions) > 1:
            raise ValueError(
                f"a session has one completion: n must be 1 and so must best_of, got {params.n} "
                f"and {params.best_of}"
            )
        return request

    def _take(self, request_ids: set[str]) -> list[RequestOutput]:
        """Of what has been reported, that of these requests; what nobody waits for is dropped."""
        outputs = self._untaken
        self._untaken = [
            o for o in outputs if o.request_id in self._streamed and o.request_id not in request_ids
        ]
        return [o for o in outputs if o.request_id in request_ids]

    def _next_id(self) -> str:
        self._num_requests += 1
        return str(self._num_requests - 1)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"sampling_params must be one or as many as the {count} prompts, got {len(params)}"
        )
    return list(params)


def _score(output: RequestOutput, start: int) -> ScoreOutput:
    """Of the prompt's tokens from `start` on."""
    token_ids = output.prompt_token_ids[start:]
    assert output.prompt_logprobs is not None
    if len(output.prompt_logprobs) < len(output.prompt_token_ids):
        reason = output.outputs[0].stop_reason
        raise RuntimeError(f"a continuation could not be scored: {reason}")
    entries = [
        entry[token_id]
        for token_id, entry in zip(token_ids, output.prompt_logprobs[start:], strict=True)
        if entry is not None
    ]
    return ScoreOutput(
        token_ids, [entry.logprob for entry in entries], all(entry.rank == 1 for entry in entries)
    )
