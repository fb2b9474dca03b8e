"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn

from nano_vllm import ops


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> the same shape."""
        out = torch.empty_like(x)
        ops.rms_norm(out, x, self.weight, self.eps)
        return out

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x, in place; returns the norm of the sum, in the memory of x."""
        ops.fused_add_rms_norm(x, x, residual, self.weight, self.eps)
        return x
