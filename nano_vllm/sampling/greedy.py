"""The likeliest tokens of logits that ranks share by vocabulary, which stay where they are."""

from __future__ import annotations

import math

import torch

from nano_vllm.distributed.collectives import Collectives


def likeliest_tokens(logits: torch.Tensor, held: range, ranks: Collectives) -> torch.Tensor:
    """What `ops.sample_tokens` takes at temperature 0, the same on all ranks.

    Args:
        logits: [num_rows, the rank's part of the vocabulary, padded], any floating dtype.
        held: tokens of that part.
        ranks: who shares the vocabulary.

    Returns:
        [num_rows], int64: the likeliest token, the first of equal ones; -1 where the largest logit
        is NaN or infinite, -2 where all are -inf.
    """
    if held:
        values, places = logits[:, : len(held)].max(dim=-1)
        # Exact in float64, both of them: one message.
        best = torch.stack((values.double(), (places + held.start).double()))
    else:
        best = logits.new_full((2, len(logits)), -math.inf, dtype=torch.float64)
    found = ranks.all_gather(best)
    largest, rank = found[:, 0].max(dim=0)
    token_ids = found[:, 1].gather(0, rank[None])[0].long()
    token_ids = token_ids.masked_fill(~largest.isfinite(), -1)
    return token_ids.masked_fill_(largest == -math.inf, -2)
