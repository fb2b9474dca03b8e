"""Makes text of tokens, and results of sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from nano_vllm.engine.request import Completion, Request
from nano_vllm.logprob import Logprob
from nano_vllm.outputs import CompletionOutput, RequestOutput
from nano_vllm.tokenizer.tokenizer import Tokenizer


class OutputProcessor:
    """Follows sequences with text.

    Args:
        tokenizer: None where the engine runs on token ids alone.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def advance(self, completion: Completion) -> str | None:
        """Turn the sequence's new tokens into text: those since the last call.

        The token that ends a sequence stays among its token ids but gives no text, except with
        include_stop_str_in_output.

        Returns:
            the stop string that ends the text here, if one does.
        """
        if completion.detokenizer is None:
            return None
        sequence, text = completion.sequence, completion.text
        num_seen = completion.num_seen_tokens
        tokens = sequence.token_ids[sequence.num_prompt_tokens + num_seen :]
        completion.num_seen_tokens += len(tokens)
        if sequence.output_logprobs:
            self._name_tokens(sequence.output_logprobs[num_seen:])
        if sequence.prompt_logprobs and num_seen == 0:
            self._name_tokens(entry for entry in sequence.prompt_logprobs if entry)
        if text.found is not None:
            return None
        params = sequence.params
        may_stop = sequence.num_output_tokens > params.min_tokens
        ended_by_token = sequence.finish_reason == "stop"
        for place, token_id in enumerate(tokens, start=1):
            if ended_by_token and place == len(tokens) and not params.include_stop_str_in_output:
                break
            text.push(completion.detokenizer.push(token_id), may_stop)
        if sequence.is_finished:
            text.push(completion.detokenizer.flush(), may_stop)
        return text.found

    def output(self, request: Request) -> RequestOutput:
        """The request's result so far; text that a stop string may yet take back is left out."""
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            request.prompt_logprobs,
            [
                _completion_output(request, index, completion)
                for index, completion in enumerate(request.results)
            ],
            request.is_finished,
            replace(request.metrics, num_preemptions=request.num_preemptions),
            request.num_cached_tokens,
        )

    def _name_tokens(self, entries: Iterable[dict[int, Logprob]]) -> None:
        assert self._tokenizer is not None, "text is wanted without a tokenizer"
        for entry in entries:
            for token_id, logprob in entry.items():
                logprob.decoded_token = self._tokenizer.token_text(token_id)


def _completion_output(request: Request, index: int, completion: Completion) -> CompletionOutput:
    sequence, text = completion.sequence, completion.text
    has_logprobs = request.has_logprobs
    return CompletionOutput(
        index,
        text.text if sequence.is_finished else text.settled_text,
        sequence.output_token_ids,
        sequence.cumulative_logprob if has_logprobs or request.beams is not None else None,
        list(sequence.output_logprobs) if has_logprobs else None,
        sequence.finish_reason,
        sequence.stop_reason,
    )
