"""Log-probabilities that are reported beside the tokens."""

from __future__ import annotations

import torch

from nano_vllm.outputs import Logprob

ROWS_AT_ONCE = 32
"""Rows that exist in float64 at the same time: else the last bits of a sum would depend on how many
rows there are.
"""


def logprob_entries(
    logits: torch.Tensor, token_ids: list[int], num_logprobs: int | list[int]
) -> list[dict[int, Logprob]]:
    """For each row the entry of its token and those of the likeliest tokens.

    Args:
        logits: [num_rows, vocab_size], raw, any floating dtype.
        token_ids: [num_rows].
        num_logprobs: likeliest tokens to report, for all rows or for each.

    Returns:
        token id -> Logprob for each row: the token itself first, then the likeliest in order. Equal
        logits share a rank.
    """
    counts = [num_logprobs] * len(token_ids) if isinstance(num_logprobs, int) else num_logprobs
    entries = []
    for low in range(0, len(token_ids), ROWS_AT_ONCE):
        part = slice(low, low + ROWS_AT_ONCE)
        entries += _entries(logits[part].double(), token_ids[part], counts[part])
    return entries


def _entries(
    logits: torch.Tensor, token_ids: list[int], counts: list[int]
) -> list[dict[int, Logprob]]:
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(-1, torch.tensor(token_ids, device=logits.device).unsqueeze(-1))
    ranks = ((logits > chosen).sum(dim=-1) + 1).tolist()
    chosen_logprobs = (chosen - normaliser).squeeze(-1).tolist()
    top = logits.topk(max(counts), dim=-1)
    top_logprobs, top_ids = (top.values - normaliser).tolist(), top.indices.tolist()
    entries = []
    for row, token_id in enumerate(token_ids):
        entry = {token_id: Logprob(chosen_logprobs[row], ranks[row])}
        rank, previous = 0, None
        for place, logprob in enumerate(top_logprobs[row][: counts[row]]):
            if logprob != previous:
                rank, previous = place + 1, logprob
            entry.setdefault(top_ids[row][place], Logprob(logprob, rank))
        entries.append(entry)
    return entries
