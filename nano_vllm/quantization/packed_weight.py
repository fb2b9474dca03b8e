"""Weights of 4 or 8 bits in groups of 32 columns, as `ops.quantized_linear` reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZE = 32
"""Columns that share a scale and a minimum."""
_ROWS = 16
"""Output rows that lie together: one vector of 32-bit sums."""


@dataclass(slots=True)
class QuantizedWeight:
    """A matrix whose elements are scale * quant + minimum."""

    bits: int
    """4 or 8."""
    quants: torch.Tensor
    """[out_features, in_features], uint8, below 2^bits."""
    scales: torch.Tensor
    """[out_features, in_features / 32], float16."""
    minima: torch.Tensor
    """[out_features, in_features / 32], float16."""

    def dequantize(self) -> torch.Tensor:
        """[out_features, in_features], float32."""
        groups = self.quants.view(*self.scales.shape, GROUP_SIZE).float()
        groups = groups * self.scales.float()[..., None] + self.minima.float()[..., None]
        return groups.view(self.quants.shape)


def pack(shards: list[QuantizedWeight]) -> torch.Tensor:
    """The shards' rows one after the other, in 4 bits if all of them are.

    Returns:
        [ceil(out_features / 16), in_features / 32, 320 or 576], uint8: of each group of 16 rows the
        quants, then 16 scales and 16 minima. With 8 bits, quants are [8 steps, 16 rows, 4 columns];
        with 4 bits two steps share their bytes, the first in the low halves.
    """
    bits = max(shard.bits for shard in shards)
    num_rows = sum(shard.quants.shape[0] for shard in shards)
    num_blocks, num_groups = -(-num_rows // _ROWS), shards[0].scales.shape[1]

    def blocks_of(tensors: list[torch.Tensor]) -> torch.Tensor:
        rows = tensors[0].new_zeros(num_blocks * _ROWS, tensors[0].shape[1])
        torch.cat(tensors, out=rows[:num_rows])
        return rows.view(num_blocks, _ROWS, num_groups, -1)

    # [block, row, group, step, column] -> [block, group, step, row, column]
    steps = blocks_of([shard.quants for shard in shards]).unflatten(-1, (-1, 4))
    steps = steps.permute(0, 2, 3, 1, 4)
    if bits == 4:
        steps = steps[:, :, 0::2] | steps[:, :, 1::2] << 4
    halves = [
        blocks_of([getattr(shard, name) for shard in shards]).permute(0, 2, 1, 3)
        for name in ("scales", "minima")
    ]
    numbers = torch.cat(halves, dim=2).reshape(num_blocks, num_groups, 2 * _ROWS)
    return torch.cat((steps.flatten(2), numbers.contiguous().view(torch.uint8)), dim=2)
