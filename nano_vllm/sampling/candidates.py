"""The likeliest tokens of logits that ranks share by vocabulary, for the rank that samples."""

from __future__ import annotations

import math

import torch

from nano_vllm.distributed.collectives import Collectives


def gather_candidates(
    logits: torch.Tensor, held: range, count: int, ranks: Collectives, vocab_size: int
) -> torch.Tensor | None:
    """Rows from which `ops.sample_tokens` draws the same tokens as from the whole ones, at
    temperature 0 or with a top-k of at most `count`.

    A rank sends the largest `count` logits of its part, and where they stand. What top-k keeps of a
    row is among these, and what equals the last of them: any number of tokens may, as tokens of
    equal logits stay or go together. So which ones do not is sent as well, in a bit for each token.

    Args:
        logits: [num_rows, the rank's part of the vocabulary, padded], any floating dtype; what is
            behind the tokens held is overwritten.
        held: tokens of that part.
        count: from 1 on, the same on all ranks.
        ranks: who shares the vocabulary.
        vocab_size: tokens of all parts.

    Returns:
        [num_rows, vocab_size], of the same dtype, on the first rank; what nobody has sent is -inf.
        Others get None, unless there are no rows.
    """
    logits[:, len(held) :] = -math.inf
    values, places = logits.topk(min(count, logits.shape[1]), dim=-1)
    others = _packed(logits != values[:, -1:])
    parts = [values.view(torch.uint8), places.int().view(torch.uint8), others]
    sizes = [part.shape[1] for part in parts]
    gathered = ranks.gather_columns(torch.cat(parts, dim=1), ranks.size * sum(sizes))
    if gathered is None:
        return None
    each = gathered.unflatten(1, (ranks.size, sum(sizes)))  # [num_rows, num_ranks, bytes]
    values, places, others = (part.contiguous() for part in each.split(sizes, dim=2))
    values = values.view(logits.dtype)
    rows = values[..., -1:].masked_fill(_unpacked(others), -math.inf)
    rows.scatter_(2, places.view(torch.int32).long(), values)
    return rows.flatten(1)[:, :vocab_size]


def _packed(flags: torch.Tensor) -> torch.Tensor:
    """[..., 8 n], bool -> [..., n], uint8: bit i is the i-th of eight flags."""
    eights = flags.view(torch.int64)  # whose bits 8 i go to 56 + i
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """What was packed."""
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) & bits).bool().flatten(-2)
