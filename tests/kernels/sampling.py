"""Arguments of `sample_tokens` and `adjust_logits`, and what they should give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

MASK = 2**64 - 1


def philox4x32(key: int, low: int, high: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 as its paper writes it down (Salmon et al., SC 2011)."""
    words = [low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ keys[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ words[3] ^ keys[1],
            first & 0xFFFFFFFF,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words[0], words[1], words[2], words[3]


def uniform(seed: int, position: int, stream: int) -> float:
    """The number that a row with these draws by."""
    words = philox4x32(seed & MASK, position & MASK, stream & MASK)
    return ((words[1] << 32 | words[0]) >> 11) * 2.0**-53


def sample_arguments(
    logits: torch.Tensor,
    temperatures: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    seeds: Sequence[int] | None = None,
    streams: int | Sequence[int] = 0,
    seq_lens: int | Sequence[int] = 7,
    prompt_lens: int | Sequence[int] = 5,
) -> dict[str, torch.Tensor]:
    """For each row, or the same for all of them; row i has seed i by default."""
    count = len(logits)

    def tensor(values: Any, dtype: torch.dtype) -> torch.Tensor:
        each = values if isinstance(values, Sequence) else [values] * count
        return torch.tensor(each, dtype=dtype, device=logits.device)

    temperature = tensor(temperatures, torch.float64)
    return {
        "logits": logits,
        "temperatures": temperature,
        "top_k": tensor(top_k, torch.int32),
        "top_p": tensor(top_p, torch.float64),
        # 0 * -inf would be NaN
        "min_p": tensor(min_p, torch.float64).log().mul(temperature).nan_to_num(-math.inf),
        "seeds": tensor(list(range(count)) if seeds is None else seeds, torch.int64),
        "streams": tensor(streams, torch.int64),
        "seq_lens": tensor(seq_lens, torch.int32),
        "prompt_lens": tensor(prompt_lens, torch.int32),
    }


def kept_weights(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Weights of one row's tokens, in float64; 0 for those that the filters drop."""
    exponents = (logits.double() - logits.double().max()) / temperature
    weights = exponents.exp()
    if 0 < top_k < len(logits):
        weights[logits < logits.sort(descending=True).values[top_k - 1]] = 0
    if top_p < 1:
        ordered = weights.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        weights[weights < ordered[before < top_p * ordered.sum()].min()] = 0
    weights[exponents < (math.log(min_p) if min_p else -math.inf)] = 0
    return weights


def token_lists(lists: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each list starts, and their tokens."""
    starts = [0]
    for tokens in lists:
        starts.append(starts[-1] + len(tokens))
    flat: Iterable[int] = (token for tokens in lists for token in tokens)
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(list(flat), dtype=torch.int32)


def adjust_arguments(
    logits: torch.Tensor,
    said: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    rows: Sequence[int] | None = None,
    max_len: int = 64,
    slots: Sequence[int] | None = None,
    repetition: Sequence[float] | None = None,
    frequency: Sequence[float] | None = None,
    presence: Sequence[float] | None = None,
    bias: Sequence[dict[int, float]] | None = None,
    allowed: Sequence[Sequence[int]] | None = None,
    ends: Sequence[Sequence[int]] | None = None,
    min_tokens: Sequence[int] | None = None,
    bad_words: Sequence[Sequence[Sequence[int]]] | None = None,
) -> dict[str, torch.Tensor]:
    """Of rows that hold the tokens `said`, the last of which is new to the device.

    Args:
        rows: of logits; by default all.
        slots: by default a row of token_ids for each, in falling order.
    """
    count = len(said)
    rows = range(count) if rows is None else rows
    slots = range(count)[::-1] if slots is None else slots
    device = logits.device
    token_ids = torch.full((count, max_len), -7, dtype=torch.int32)
    new_token_ids = torch.full((len(logits),), -9, dtype=torch.int64)
    seq_lens = torch.full((len(logits),), -9, dtype=torch.int32)
    for row, slot, tokens in zip(rows, slots, said, strict=True):
        if slot >= 0:
            token_ids[slot, : len(tokens) - 1] = torch.tensor(tokens[:-1], dtype=torch.int32)
        new_token_ids[row], seq_lens[row] = tokens[-1], len(tokens)

    def floats(values: Sequence[float] | None, default: float) -> torch.Tensor:
        return torch.tensor([default] * count if values is None else list(values))

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    none: list[list[int]] = [[]] * count
    biases = [{}] * count if bias is None else bias
    words = [[]] * count if bad_words is None else bad_words
    bias_starts, bias_token_ids = token_lists([list(b) for b in biases])
    allowed_starts, allowed_token_ids = token_lists(allowed or none)
    end_starts, end_token_ids = token_lists(ends or none)
    word_starts, _ = token_lists([range(len(of_row)) for of_row in words])
    word_token_starts, word_token_ids = token_lists([word for of_row in words for word in of_row])
    arguments = {
        "rows": ints(rows),
        "token_ids": token_ids,
        "slots": ints(slots),
        "new_token_ids": new_token_ids,
        "seq_lens": seq_lens,
        "prompt_lens": ints(prompt_lens),
        "repetition_penalties": floats(repetition, 1.0),
        "frequency_penalties": floats(frequency, 0.0),
        "presence_penalties": floats(presence, 0.0),
        "bias_starts": bias_starts,
        "bias_token_ids": bias_token_ids,
        "bias_values": torch.tensor([v for b in biases for v in b.values()], dtype=torch.float32),
        "allowed_starts": allowed_starts,
        "allowed_token_ids": allowed_token_ids,
        "end_starts": end_starts,
        "end_token_ids": end_token_ids,
        "min_tokens": ints([0] * count if min_tokens is None else min_tokens),
        "bad_word_starts": word_starts,
        "bad_word_token_starts": word_token_starts,
        "bad_word_token_ids": word_token_ids,
    }
    return {"logits": logits, **{name: value.to(device) for name, value in arguments.items()}}
