"""Linear layers: alone, with several checkpoint tensors stacked into one product, and shared by
ranks.

Tensor parallel as in Megatron-LM (arXiv 1909.08053): a stacked layer's output features are dealt
out, and the input features of the row-parallel layer behind it, whose products are then summed.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from nano_vllm import ops
from nano_vllm.distributed.collectives import ALONE, Collectives
from nano_vllm.distributed.sharding import columns_of, on_first_rank, share, stacked_rows


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
    features, of which a rank has its share.

    Args:
        in_features: columns of the input.
        shards: name of each shard -> its output features on all ranks together, in order.
        bias: whether there is a bias.
        unit: output features that stay on one rank. Shards of fewer units than ranks are held by
            several.
        ranks: who shares the layer.
    """

    def __init__(
        self,
        in_features: int,
        shards: dict[str, int],
        bias: bool = False,
        unit: int = 1,
        ranks: Collectives = ALONE,
    ) -> None:
        held = sum(len(share(size // unit, ranks)) * unit for size in shards.values())
        super().__init__(in_features, held, bias)
        self.weight.sharding = stacked_rows(shards, unit, (in_features,), ranks)  # type: ignore[attr-defined]
        if self.bias is not None:
            self.bias.sharding = stacked_rows(shards, unit, (), ranks)  # type: ignore[attr-defined]


class RowParallelLinear(Linear):
    """A linear layer whose input features are dealt out: the ranks' products are summed.

    Args:
        in_features: columns of the input, on all ranks together.
        out_features: columns of the output, on each rank.
        bias: whether there is a bias; the first rank adds it.
        ranks: who shares the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        ranks: Collectives = ALONE,
    ) -> None:
        super().__init__(len(share(in_features, ranks)), out_features, bias)
        self._ranks = ranks
        self.weight.sharding = columns_of(out_features, in_features, ranks)  # type: ignore[attr-defined]
        if self.bias is not None:
            self.bias.data.zero_()
            self.bias.sharding = on_first_rank(out_features, ranks)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_rows, the rank's input features] -> [num_rows, out_features]."""
        return self._ranks.all_reduce(super().forward(x))
