"""Embeddings of tokens and of positions, and the head that scores the vocabulary."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nano_vllm.distributed.collectives import ALONE, Collectives
from nano_vllm.distributed.sharding import vocabulary_rows
from nano_vllm.layers.linear import Linear


class Embedding(nn.Module):
    """One row per token of the vocabulary, or per position.

    Args:
        num_rows: tokens of the vocabulary.
        hidden_size: elements of a row.
        multiplier: of what comes out, rounded to the model's dtype.
        ranks: who shares the rows; each finds those it has, and the sum is the whole.
    """

    def __init__(
        self,
        num_rows: int,
        hidden_size: int,
        multiplier: float = 1.0,
        ranks: Collectives = ALONE,
    ) -> None:
        super().__init__()
        self._ranks = ranks
        rows, self._held, sharding = vocabulary_rows(num_rows, hidden_size, ranks)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)
        self.weight.data[len(self._held) :].zero_()
        self.weight.sharding = sharding  # type: ignore[attr-defined]
        self.multiplier = float(torch.tensor(multiplier, dtype=self.weight.dtype, device="cpu"))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, hidden_size]."""
        if self._ranks.size == 1:
            rows = functional.embedding(indices, self.weight)
        else:
            indices = indices - self._held.start
            is_foreign = (indices < 0) | (indices >= len(self._held))
            rows = functional.embedding(indices.masked_fill(is_foreign, 0), self.weight)
            rows = self._ranks.all_reduce(rows.masked_fill_(is_foreign[:, None], 0))
        return rows if self.multiplier == 1.0 else rows * self.multiplier


class LMHead(Linear):
    """Scores every token of the vocabulary.

    Args:
        hidden_size: columns of the input.
        vocab_size: tokens of the vocabulary.
        ranks: who shares them; each scores those it has.
    """

    def __init__(self, hidden_size: int, vocab_size: int, ranks: Collectives = ALONE) -> None:
        rows, self.held, sharding = vocabulary_rows(vocab_size, hidden_size, ranks)
        super().__init__(hidden_size, rows)
        self.weight.data[len(self.held) :].zero_()
        self.weight.sharding = sharding  # type: ignore[attr-defined]
