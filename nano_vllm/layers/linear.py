"""Linear layers, alone and with several checkpoint tensors stacked into one product."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nano_vllm import ops


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features: columns of x.
        out_features: columns of y.
        bias: whether there is a b.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: torch.Tensor | None = None
        """A quantized weight, on a CPU, which then stands for `weight`; see `quantization/`."""
        self.max_rows = ops.linear_max_rows(self.weight)
        """Products of up to this many rows go through the project's own kernel, others through
        torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, in_features] -> [num_rows, out_features]."""
        if self.packed is not None:
            out = x.new_empty(x.shape[0], self.weight.shape[0])
            ops.quantized_linear(out, x, self.packed, self.bias)
            return out
        if x.shape[0] <= self.max_rows:
            out = x.new_empty(x.shape[0], self.weight.shape[0])
            ops.linear(out, x, self.weight, self.bias)
            return out
        return functional.linear(x, self.weight, self.bias)


class StackedLinear(Linear):
    """Linear layers on the same input as one product; each is a shard of consecutive output
    features.

    Args:
        in_features: columns of the input.
        shards: name of each shard -> its output features, in order.
        bias: whether there is a bias.
    """

    def __init__(self, in_features: int, shards: dict[str, int], bias: bool = False) -> None:
        super().__init__(in_features, sum(shards.values()), bias)
        self.shard_sizes = list(shards.values())
        self._rows: dict[str, slice] = {}
        start = 0
        for name, size in shards.items():
            self._rows[name] = slice(start, start + size)
            start += size
        self.weight.weight_loader = self.load_shard  # type: ignore[attr-defined]
        if self.bias is not None:
            self.bias.weight_loader = self.load_shard  # type: ignore[attr-defined]

    def first_row(self, shard: str | None) -> int:
        """Where the shard's output features begin."""
        return 0 if shard is None else self._rows[shard].start

    def load_shard(self, parameter: nn.Parameter, tensor: torch.Tensor, shard: str | None) -> None:
        """Copy a checkpoint tensor into its rows of the stacked parameter; without a shard, one
        that is stacked already.
        """
        target = parameter.data if shard is None else parameter.data[self._rows[shard]]
        if target.shape != tensor.shape:
            raise ValueError(
                f"{shard or 'it'} must have shape {list(target.shape)}, got {list(tensor.shape)}"
            )
        target.copy_(tensor)
