"""What the sampling kernels read of the requests in a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nano_vllm.sampling.gathering import LIKELIEST, MAX_CANDIDATES, WHOLE
from nano_vllm.sampling.token_history import TokenHistory
from nano_vllm.sequence import Sequence

Array = npt.NDArray[Any]
ADJUSTED, LOOKS_BACK, GOES_ON, HAS_LOGPROBS = 1, 2, 4, 8
"""Traits of a row: its logits are never drawn from as they are; what was said changes them; it may
not end before min_tokens; log-probabilities are wanted.
"""
SPARE_PLACES = 1024
"""Requests that a RequestTable has beside those of the batch, which may come back."""


class RequestTable:
    """The numbers of each request that was lately drawn for: what is read of it is read once, and a
    batch that changes by a row is put together again in no time. It goes by the sequences'
    numbers, which an engine gives but once, and keeps none of them, whose tokens may be many.

    Args:
        engine_seed: of the draws of requests that have no seed.
    """

    def __init__(self, engine_seed: int) -> None:
        self._engine_seed = engine_seed
        self._places: dict[int, int] = {}  # by seq_id
        self._floats: Array = np.empty((3, 0))  # temperature, top_p, min_p
        self._longs: Array = np.empty((2, 0), dtype=np.int64)  # seed, stream
        self._ints: Array = np.empty((2, 0), dtype=np.int32)  # top_k, prompt tokens
        self._traits: Array = np.empty(0, dtype=np.uint8)

    def draws(self, sequences: list[Sequence]) -> tuple[dict[str, Array], Array]:
        """Arguments of `ops.sample_tokens`, and the traits of each row."""
        places = np.array(self._places_of(sequences), dtype=np.intp)
        temperatures, top_p, min_p = self._floats.take(places, axis=1)
        seeds, streams = self._longs.take(places, axis=1)
        top_k, prompt_lens = self._ints.take(places, axis=1)
        draws = {
            "temperatures": temperatures,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seeds": seeds,
            "streams": streams,
            "prompt_lens": prompt_lens,
        }
        return draws, self._traits.take(places)

    def _places_of(self, sequences: list[Sequence]) -> list[int]:
        if len(self._places) > 2 * len(sequences) + SPARE_PLACES:  # the others may have ended
            self._places.clear()
        known = self._places
        places = [known.get(sequence.seq_id, -1) for sequence in sequences]
        if -1 in places:
            self._grow(len(known) + places.count(-1))
            for row, place in enumerate(places):
                if place < 0:
                    sequence = sequences[row]
                    places[row] = known[sequence.seq_id] = place = len(known)
                    self._read(sequence, place)
        return places

    def _grow(self, num_places: int) -> None:
        more = num_places - len(self._traits)
        if more > 0:
            more += num_places  # so that it is seldom
            self._floats, self._longs, self._ints = (
                np.pad(numbers, ((0, 0), (0, more)))
                for numbers in (self._floats, self._longs, self._ints)
            )
            self._traits = np.pad(self._traits, (0, more))

    def _read(self, sequence: Sequence, place: int) -> None:
        params = sequence.params
        min_p = params.temperature * math.log(params.min_p) if params.min_p else -math.inf
        self._floats[:, place] = params.temperature, params.top_p, min_p
        if params.seed is None:
            self._longs[:, place] = _signed(self._engine_seed), sequence.seq_id + 1
        else:  # other completions of a request have seeds of their own
            self._longs[:, place] = _signed(params.seed + sequence.index), 0
        top_k = min(max(params.top_k, 0), 2**31 - 1)
        self._ints[:, place] = top_k, sequence.num_prompt_tokens
        self._traits[place] = (
            ADJUSTED * _is_adjusted(sequence)
            | LOOKS_BACK * _looks_back(sequence)
            | GOES_ON * (params.min_tokens > 0 and bool(sequence.end_token_ids))
            | HAS_LOGPROBS * (params.logprobs is not None)
        )


class SamplingRows:
    """The numbers of a batch's requests, on the device. They are those of the next step too, as
    long as the same sequences come.

    Args:
        sequences: of the rows.
        num_ahead: leading rows whose sequences do not know their last token yet.
        table: has what is read of requests.
        history: what sequences have said.
        device: of the logits.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        num_ahead: int,
        table: RequestTable,
        history: TokenHistory,
        device: torch.device,
    ) -> None:
        self.sequences = sequences
        draws, traits = table.draws(sequences)
        self.logprob_rows: list[int] = np.flatnonzero(traits & HAS_LOGPROBS).tolist()
        adjusted: list[int] = []
        waiting = []  # for min_tokens alone
        for row in np.flatnonzero(traits & (ADJUSTED | GOES_ON)).tolist():
            if traits[row] & ADJUSTED:
                adjusted.append(row)
            elif _must_go_on(sequences[row], row < num_ahead):
                adjusted.append(row)
                waiting.append(row)
        self.steps_left = min(
            (
                sequences[row].params.min_tokens
                - sequences[row].num_output_tokens
                - (row < num_ahead)
                for row in waiting
            ),
            default=None,
        )
        """Steps until a row needs no adjustment any more; None for no such step."""
        adjustments: dict[str, Array] = {}
        looking_back = [sequences[row] for row in np.flatnonzero(traits & LOOKS_BACK).tolist()]
        slots = dict(zip(looking_back, history.keep(looking_back, device), strict=True))
        self.num_candidates = WHOLE
        """Of each row, from each rank that has a part of the logits; see `gathering`."""
        if not (adjusted or self.logprob_rows):
            self.num_candidates = _num_candidates(draws["top_k"], draws["temperatures"])
        if adjusted:
            adjusted_rows = np.full(len(sequences), -1, dtype=np.int32)
            adjusted_rows[adjusted] = range(len(adjusted))
            draws["adjusted_rows"] = adjusted_rows
            adjustments = _adjustments([sequences[row] for row in adjusted], adjusted, slots)
        tensors = _to_device([*draws.values(), *adjustments.values()], device)
        self.draws = dict(zip(draws, tensors, strict=False))
        """Arguments of `ops.sample_tokens`."""
        self.adjustments = dict(zip(adjustments, tensors[len(draws) :], strict=True))
        """Arguments of `ops.adjust_logits`; none if all rows are drawn from as they are."""
        self.num_adjusted = len(adjusted)


def _num_candidates(top_k: Array, temperatures: Array) -> int:
    """Enough for rows that are drawn from as they are, and of which no more is asked."""
    top_k = top_k[temperatures != 0.0]
    if not len(top_k):
        return LIKELIEST
    most = int(top_k.max())
    return most if top_k.min() > 0 and most <= MAX_CANDIDATES else WHOLE


def rows_with_logprobs(sequences: list[Sequence]) -> list[int]:
    """Rows that ask for log-probabilities."""
    return [row for row, s in enumerate(sequences) if s.params.logprobs is not None]


def can_be_adjusted(sequence: Sequence) -> bool:
    """Whether a token is ever drawn from other logits than the model's."""
    return _is_adjusted(sequence) or sequence.params.min_tokens > 0


def _must_go_on(sequence: Sequence, lead: int) -> bool:
    """Whether min_tokens forbids an end here."""
    return bool(sequence.end_token_ids) and (
        sequence.num_output_tokens + lead < sequence.params.min_tokens
    )


def _looks_back(sequence: Sequence) -> bool:
    """Whether what was said changes the logits."""
    params = sequence.params
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or bool(sequence.bad_words)
    )


def _is_adjusted(sequence: Sequence) -> bool:
    """Whether the row's logits are never drawn from as they are."""
    params = sequence.params
    return _looks_back(sequence) or bool(params.logit_bias or params.allowed_token_ids)


def _adjustments(
    sequences: list[Sequence], rows: list[int], slots: dict[Sequence, int]
) -> dict[str, Array]:
    """Arguments of `ops.adjust_logits` for the sequences of these rows."""
    params = [sequence.params for sequence in sequences]
    biases = [p.logit_bias or {} for p in params]
    bias_starts, bias_token_ids = _lists([list(bias) for bias in biases])
    allowed_starts, allowed_token_ids = _lists([p.allowed_token_ids or () for p in params])
    end_starts, end_token_ids = _lists([sorted(s.end_token_ids) for s in sequences])
    word_starts, word_token_ids = _lists([word for s in sequences for word in s.bad_words])
    return {
        "rows": _int32s(rows),
        "slots": _int32s(slots.get(sequence, -1) for sequence in sequences),
        "prompt_lens": _int32s(sequence.num_prompt_tokens for sequence in sequences),
        "repetition_penalties": _float32s(p.repetition_penalty for p in params),
        "frequency_penalties": _float32s(p.frequency_penalty for p in params),
        "presence_penalties": _float32s(p.presence_penalty for p in params),
        "bias_starts": bias_starts,
        "bias_token_ids": bias_token_ids,
        "bias_values": _float32s(value for bias in biases for value in bias.values()),
        "allowed_starts": allowed_starts,
        "allowed_token_ids": allowed_token_ids,
        "end_starts": end_starts,
        "end_token_ids": end_token_ids,
        "min_tokens": _int32s(p.min_tokens for p in params),
        "bad_word_starts": _starts(sequence.bad_words for sequence in sequences),
        "bad_word_token_starts": word_starts,
        "bad_word_token_ids": word_token_ids,
    }


def _float32s(values: Iterable[float]) -> Array:
    return np.array(list(values), dtype=np.float32)


def _int32s(values: Iterable[int]) -> Array:
    return np.array(list(values), dtype=np.int32)


def _signed(value: int) -> int:
    """The int64 that is the same modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def _starts(lists: Iterable[Sized]) -> Array:
    return np.cumsum([0, *map(len, lists)], dtype=np.int32)


def _lists(lists: list[Items[int]]) -> tuple[Array, Array]:
    """Where each begins, and all of them behind one another."""
    return _starts(lists), _int32s(token for tokens in lists for token in tokens)


def _to_device(arrays: list[Array], device: torch.device) -> list[torch.Tensor]:
    """In one copy, which is not waited for."""
    sizes = [-(-array.nbytes // 8) * 8 for array in arrays]
    staging = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staging.numpy()
    offsets = np.cumsum([0, *sizes])
    for array, offset in zip(arrays, offsets, strict=False):
        host[offset : offset + array.nbytes] = array.view(np.uint8)
    there = staging.to(device, non_blocking=True)
    return [
        there[offset : offset + array.nbytes].view(torch.from_numpy(array).dtype)
        for array, offset in zip(arrays, offsets, strict=False)
    ]
