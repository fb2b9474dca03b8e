"""Normalisation of the residual stream and of attention heads."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from nano_vllm import ops
from nano_vllm.distributed.collectives import Collectives
from nano_vllm.distributed.sharding import share, stacked_rows


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight.

    Args:
        hidden_size: elements of x.
        eps: added to the mean of squares.
        offset: added to the checkpoint's weights as they are loaded; the sum is rounded to the
            model's dtype.
    """

    def __init__(self, hidden_size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps
        if offset:
            self.weight.weight_loader = partial(_load_with_offset, offset)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> the same shape."""
        out = torch.empty_like(x)
        ops.rms_norm(out, x, self.weight, self.eps)
        return out

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x, in place; returns the norm of the sum, in the memory of x."""
        ops.fused_add_rms_norm(x, x, residual, self.weight, self.eps)
        return x


class SharedRMSNorm(RMSNorm):
    """An RMSNorm of rows whose elements are dealt out to ranks; each normalises its own.

    Args:
        hidden_size: elements of x, on all ranks together.
        eps: added to the mean of squares.
        offset: as in RMSNorm.
        unit: elements that stay on one rank; of fewer units than ranks, several hold the same one.
        ranks: who shares the rows.
    """

    def __init__(
        self, hidden_size: int, eps: float, offset: float, unit: int, ranks: Collectives
    ) -> None:
        held = len(share(hidden_size // unit, ranks)) * unit
        super().__init__(held, eps, offset)
        self._ranks = ranks
        self._num_summed = held * ranks.size
        """Elements of the ranks together, those that several have as often as they have them."""
        self.weight.sharding = stacked_rows({"": hidden_size}, unit, (), ranks)  # type: ignore[attr-defined]

    def norm_in_place(self, x: torch.Tensor) -> None:
        """[num_rows, the rank's elements], rows at any stride."""
        if self._ranks.size == 1:
            ops.rms_norm(x, x, self.weight, self.eps)
            return
        squares = self._ranks.all_reduce(x.float().square().sum(dim=-1, keepdim=True))
        scale = (squares / self._num_summed + self.eps).rsqrt()
        x.copy_(x.float() * scale * self.weight)


def _load_with_offset(
    offset: float, parameter: nn.Parameter, tensor: torch.Tensor, _: object
) -> None:
    if parameter.shape != tensor.shape:
        raise ValueError(f"must have shape {list(parameter.shape)}, got {list(tensor.shape)}")
    parameter.data.copy_(tensor.float() + offset)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv 1607.06450)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> the same shape."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x, in place; returns the norm of the sum."""
        residual.add_(x)
        return self(residual)
