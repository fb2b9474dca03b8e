"""Embeddings of tokens and of positions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Embedding(nn.Module):
    """One row per token of the vocabulary, or per position.

    Args:
        num_rows: tokens of the vocabulary.
        hidden_size: elements of a row.
        multiplier: of what comes out, rounded to the model's dtype.
    """

    def __init__(self, num_rows: int, hidden_size: int, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size), requires_grad=False)
        self.multiplier = float(torch.tensor(multiplier, dtype=self.weight.dtype, device="cpu"))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden_size]."""
        rows = functional.embedding(indices, self.weight)
        return rows if self.multiplier == 1.0 else rows * self.multiplier
