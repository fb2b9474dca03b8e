"""Top-k, top-p and min-p: the unlikely tokens are left out of the draw."""

from __future__ import annotations

import math

import torch

from nano_vllm.sampling_params import SamplingParams

TOP_P_CANDIDATES = 256
"""How many of the likeliest tokens are sorted for top-p before the whole vocabulary is."""


ROWS_AT_ONCE = 32
"""Rows whose logits exist at the same time in float64."""


def has_nucleus(params: SamplingParams) -> bool:
    """Whether top-k or top-p may drop a token, for which the row's logits have to be looked at."""
    return not params.greedy and (params.top_p < 1.0 or params.top_k > 0)


def min_p_floors(params: list[SamplingParams]) -> torch.Tensor:
    """What min-p asks of (logit - largest) / temperature; [num_rows], float64."""
    floors = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
    return torch.tensor(floors, dtype=torch.float64)


def raise_floors(floors: torch.Tensor, logits: torch.Tensor, params: list[SamplingParams]) -> None:
    """Raise floors, [num_rows], to what top-k and top-p ask of (logit - largest) / temperature.

    What is less likely is not drawn. So tokens of equal probability stay or go together; top_k = 1
    keeps two if they tie for the first place.

    Args:
        floors: float64, on the device of the logits.
        logits: [num_rows, vocab_size], any floating dtype; not changed.
        params: of the rows; greedy ones drop nothing.
    """
    nucleus = [row for row, p in enumerate(params) if has_nucleus(p)]
    for low in range(0, len(nucleus), ROWS_AT_ONCE):
        rows = nucleus[low : low + ROWS_AT_ONCE]
        temperatures = torch.tensor(
            [[params[row].temperature] for row in rows], dtype=torch.float64, device=logits.device
        )
        scaled = logits[rows].double()
        scaled.sub_(scaled.amax(dim=-1, keepdim=True)).div_(temperatures)
        floor = _top_k_top_p_floor(scaled, [params[row] for row in rows])
        floors[rows] = floors[rows].maximum(floor)


def _top_k_top_p_floor(scaled: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The smallest logit that top-k and then top-p keep; [num_rows].

    Args:
        scaled: [num_rows, vocab_size], float64; logits divided by the temperature, the largest of
            each row being 0.
        params: of the rows.
    """
    vocab_size = scaled.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    needed = [k if k < vocab_size else min(TOP_P_CANDIDATES, vocab_size) for k in top_k]
    candidates = scaled.topk(max(needed), dim=-1).values
    k = torch.tensor(top_k, device=scaled.device)
    floor = candidates.gather(-1, k.clamp(max=candidates.shape[-1]).sub(1).unsqueeze(-1))
    floor = floor.squeeze(-1).masked_fill(k == vocab_size, -math.inf)

    rows = [row for row, p in enumerate(params) if p.top_p < 1.0]
    if not rows:
        return floor
    top_p = torch.tensor(
        [params[row].top_p for row in rows], dtype=scaled.dtype, device=scaled.device
    )
    kept, candidates = scaled[rows], candidates[rows]
    total = kept.masked_fill(kept < floor[rows].unsqueeze(-1), -math.inf).exp_().sum(dim=-1)
    floor_p, reached = _top_p_floor(candidates, total, top_p)
    if any(top_k[row] == vocab_size for row in rows):
        # Flat rows, whose first candidates are less than top_p together.
        flat = (~reached & (k[rows] == vocab_size)).nonzero().squeeze(-1)
        if len(flat):
            ordered = kept[flat].sort(dim=-1, descending=True).values
            floor_p[flat], _ = _top_p_floor(ordered, total[flat], top_p[flat])
    floor[rows] = floor[rows].maximum(floor_p)
    return floor


def _top_p_floor(
    ordered: torch.Tensor, total: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last of the logits, in descending order, before which less than top_p has accumulated.

    Returns:
        that logit [num_rows], and whether the logits given reach top_p at all [num_rows].
    """
    cumulative = ordered.exp().cumsum(dim=-1)
    target = (top_p * total).unsqueeze(-1)
    last = (cumulative < target).sum(dim=-1, keepdim=True)
    last_given = last.clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(-1, last_given).squeeze(-1), last.squeeze(-1) < ordered.shape[-1]
