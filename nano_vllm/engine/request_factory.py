"""Makes requests of what callers ask for, once it has passed the gate."""

from __future__ import annotations

from dataclasses import replace

from nano_vllm.engine.bad_words import bad_word_token_ids
from nano_vllm.engine.beam_group import BeamGroup
from nano_vllm.engine.request import Completion, Request
from nano_vllm.engine.scheduler import Scheduler
from nano_vllm.engine.stop_strings import StopStrings
from nano_vllm.engine.validation import RequestLimits, check_cache_salt, check_priority
from nano_vllm.sampling.beam_search import BeamSearch
from nano_vllm.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence
from nano_vllm.tokenizer.detokenizer import Detokenizer
from nano_vllm.tokenizer.tokenizer import Tokenizer


class RequestFactory:
    """Raises ValueError, with the value and what is allowed, for what cannot be served.

    Args:
        limits: what may be asked for.
        scheduler: knows what fits its pool.
        eos_token_ids: end-of-sequence tokens.
        tokenizer: None to run on token ids alone.
    """

    def __init__(
        self,
        limits: RequestLimits,
        scheduler: Scheduler,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer

    def make(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """See Engine.add_request."""
        self._check(prompt_token_ids, params, priority, cache_salt)
        count = params.num_sequences
        own = params
        if count > params.n:
            if stream:
                raise ValueError(
                    f"best_of = {count} completions, of which n = {params.n} are returned, cannot "
                    f"be streamed"
                )
            if params.logprobs is None:
                own = replace(params, logprobs=0)  # which add up to what they are chosen by
        request = Request(request_id, prompt, prompt_token_ids, params, [], stream)
        # The prompt's log-probabilities are the same for all: the first alone reports them.
        others = replace(own, prompt_logprobs=None)
        self._add_completions(request, [own, *[others] * (count - 1)], priority, cache_salt)
        return request

    def make_beams(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: BeamSearchParams,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """See Engine.make_beam_request."""
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"params must be a BeamSearchParams, got {params!r}")
        width, most = params.beam_width, self._scheduler.max_num_seqs
        if width > most:
            raise ValueError(f"beam_width must be at most max_num_seqs = {most}, got {width}")
        end_token_ids = self._end_token_ids(params.stop_token_ids, params.ignore_eos)
        longest = self._limits.max_model_len - len(prompt_token_ids)
        search = BeamSearch(params, end_token_ids, min(params.max_tokens, longest))
        num_candidates = min(search.num_candidates, self._limits.vocab_size)
        if num_candidates > MAX_LOGPROBS:
            raise ValueError(
                f"beam_width = {width} and {len(end_token_ids)} end tokens need the "
                f"{num_candidates} likeliest tokens of each beam, but at most {MAX_LOGPROBS} "
                f"are to be had"
            )
        own = SamplingParams(
            n=params.n or width,
            best_of=width,
            temperature=0.0,
            max_tokens=params.max_tokens,
            logprobs=num_candidates,
            ignore_eos=params.ignore_eos,
            stop_token_ids=params.stop_token_ids,
        )
        self._check(prompt_token_ids, own, priority, cache_salt)
        request = Request(request_id, prompt, prompt_token_ids, own, [], stream=False)
        self._add_completions(request, [own] * width, priority, cache_salt)
        request.beams = BeamGroup(search, request.sequences)
        return request

    def _check(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str | None,
    ) -> None:
        self._limits.check(prompt_token_ids, params)
        check_priority(priority, self._scheduler.by_priority)
        check_cache_salt(cache_salt)
        self._scheduler.check_fits(len(prompt_token_ids), params.max_tokens)

    def _end_token_ids(self, stop_token_ids: list[int] | None, ignore_eos: bool) -> frozenset[int]:
        return frozenset(stop_token_ids or ()) | (
            frozenset() if ignore_eos else self._eos_token_ids
        )

    def _add_completions(
        self,
        request: Request,
        params: list[SamplingParams],
        priority: int,
        cache_salt: str | None,
    ) -> None:
        first, tokenizer = params[0], self._tokenizer
        end_token_ids = self._end_token_ids(first.stop_token_ids, first.ignore_eos)
        cache_root = self._scheduler.block_manager.cache_root(cache_salt)
        bad_words: tuple[tuple[int, ...], ...] = ()
        if first.bad_words and tokenizer is not None:
            bad_words = bad_word_token_ids(first.bad_words, tokenizer, self._limits.vocab_size)
        begins_text = tokenizer is None or tokenizer.special_token_ids.issuperset(
            request.prompt_token_ids
        )
        for index, own in enumerate(params):
            sequence = Sequence(
                -1,
                request.request_id,
                index,
                request.prompt_token_ids,
                own,
                end_token_ids,
                bad_words,
            )
            sequence.is_followed = request.stream or bool(own.stop)
            sequence.priority, sequence.cache_root = priority, cache_root
            detokenizer = None
            if tokenizer is not None and own.detokenize:
                detokenizer = Detokenizer(tokenizer, own.skip_special_tokens, begins_text)
            text = StopStrings(list(own.stop or ()), own.include_stop_str_in_output)
            request.completions.append(Completion(sequence, detokenizer, text))
