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
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence

Array = npt.NDArray[Any]


class SamplingRows:
    """The numbers of a batch's requests, on the device. They are those of the next step too, as
    long as the same sequences come.

    Args:
        sequences: of the rows.
        num_ahead: leading rows whose sequences do not know their last token yet.
        engine_seed: of the draws of requests that have no seed.
        history: what sequences have said.
        device: of the logits.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        num_ahead: int,
        engine_seed: int,
        history: TokenHistory,
        device: torch.device,
    ) -> None:
        self.sequences = sequences
        self.logprob_rows = rows_with_logprobs(sequences)
        params = [sequence.params for sequence in sequences]
        adjusted = [
            row
            for row, sequence in enumerate(sequences)
            if _is_adjusted(sequence) or _must_go_on(sequence, row < num_ahead)
        ]
        self.steps_left = min(
            (
                sequences[row].params.min_tokens
                - sequences[row].num_output_tokens
                - (row < num_ahead)
                for row in adjusted
                if not _is_adjusted(sequences[row])
            ),
            default=None,
        )
        """Steps until a row needs no adjustment any more; None for no such step."""
        draws = {
            "temperatures": _float64s(p.temperature for p in params),
            "top_k": _int32s(min(max(p.top_k, 0), 2**31 - 1) for p in params),
            "top_p": _float64s(p.top_p for p in params),
            "min_p": _float64s(
                p.temperature * math.log(p.min_p) if p.min_p else -math.inf for p in params
            ),
            # Other completions of a request have seeds of their own.
            "seeds": _int64s(
                engine_seed if s.params.seed is None else s.params.seed + s.index for s in sequences
            ),
            "streams": _int64s(s.seq_id + 1 if s.params.seed is None else 0 for s in sequences),
            "prompt_lens": _int32s(s.num_prompt_tokens for s in sequences),
        }
        adjustments: dict[str, Array] = {}
        looking_back = [sequence for sequence in sequences if _looks_back(sequence)]
        slots = dict(zip(looking_back, history.keep(looking_back, device), strict=True))
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
        self.num_candidates = WHOLE
        """Of each row, from each rank that has a part of the logits; see `gathering`."""
        if not (adjusted or self.logprob_rows):
            self.num_candidates = _num_candidates(params)


def _num_candidates(params: list[SamplingParams]) -> int:
    """Enough for rows that are drawn from as they are, and of which no more is asked."""
    top_ks = [p.top_k for p in params if p.temperature]
    if not top_ks:
        return LIKELIEST
    return max(top_ks) if all(0 < k <= MAX_CANDIDATES for k in top_ks) else WHOLE


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


def _float64s(values: Iterable[float]) -> Array:
    return np.array(list(values), dtype=np.float64)


def _float32s(values: Iterable[float]) -> Array:
    return np.array(list(values), dtype=np.float32)


def _int32s(values: Iterable[int]) -> Array:
    return np.array(list(values), dtype=np.int32)


def _int64s(values: Iterable[int]) -> Array:
    """Modulo 2^64."""
    return np.array([value & 0xFFFFFFFFFFFFFFFF for value in values], dtype=np.uint64).view(
        np.int64
    )


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
