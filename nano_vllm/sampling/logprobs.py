"""Log-probabilities that are reported beside the tokens."""

from __future__ import annotations

import torch

from nano_vllm.logprob import Logprob
from nano_vllm.sampling.logprob_rows import ROWS_AT_ONCE


def logprob_table(logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int) -> torch.Tensor:
    """For each row its token's log-probability and rank, and those of the likeliest tokens; without
    waiting for the device.

    Args:
        logits: [num_rows, vocab_size], raw, any floating dtype.
        token_ids: [num_rows], int64, in [0, vocab_size).
        num_logprobs: likeliest tokens.

    Returns:
        [num_rows, 2 + 2 * num_logprobs], float64: the token's log-probability and rank; the
        log-probabilities of the likeliest in falling order; their token ids.
    """
    parts = [
        _table(logits[low : low + ROWS_AT_ONCE], token_ids[low : low + ROWS_AT_ONCE], num_logprobs)
        for low in range(0, len(token_ids), ROWS_AT_ONCE)
    ]
    return torch.cat(parts)


def _table(logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int) -> torch.Tensor:
    logits = logits.double()
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(-1, token_ids.unsqueeze(-1))
    ranks = (logits > chosen).sum(dim=-1, keepdim=True) + 1
    top = logits.topk(num_logprobs, dim=-1)
    return torch.cat(
        (chosen - normaliser, ranks.double(), top.values - normaliser, top.indices.double()), dim=-1
    )


def logprob_entries(
    table: list[list[float]], token_ids: list[int], counts: list[int]
) -> list[dict[int, Logprob]]:
    """For each row the entry of its token and those of the likeliest tokens.

    Args:
        table: from `logprob_table`, of token_ids.
        token_ids: [num_rows].
        counts: [num_rows]; likeliest tokens to report.

    Returns:
        token id -> Logprob for each row: the token itself first, then the likeliest in order. Equal
        logits share a rank.
    """
    entries = []
    for row, token_id, count in zip(table, token_ids, counts, strict=True):
        num_logprobs = len(row) // 2 - 1
        entry = {token_id: Logprob(row[0], int(row[1]))}
        rank, previous = 0, None
        for place in range(count):
            logprob, other = row[2 + place], int(row[2 + num_logprobs + place])
            if logprob != previous:
                rank, previous = place + 1, logprob
            entry.setdefault(other, Logprob(logprob, rank))
        entries.append(entry)
    return entries
