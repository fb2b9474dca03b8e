"""Blocks of keys and values in host memory, where evicted ones wait to come back."""

from __future__ import annotations

import time

import torch

from nano_vllm.cache.kv_cache import KVCache

CHUNK_BYTES = 32 << 20
"""Of the device's memory that copies take at a time."""
SLAB_BYTES = 512 << 20
"""Pinned memory is given out in powers of two: what lies in slabs of less wastes none."""


class HostCache:
    """The next tier of a KV cache. Copies are made in the order of the calls, ahead of whatever the
    device is given later; none of them waits.

    Args:
        kv_cache: the tier above.
        num_blocks: blocks of this one. On a GPU their memory is pinned, at some 0.8 s a GiB.
    """

    def __init__(self, kv_cache: KVCache, num_blocks: int) -> None:
        pool = kv_cache.pool.view(torch.uint8)  # not every operator knows float8
        self._pool = pool.permute(2, 0, 1, 3, 4, 5)
        """[num_blocks, num_layers, 2, num_kv_heads, block_size, bytes of a head]."""
        self.num_blocks = num_blocks
        block_bytes = self._pool[0].numel()
        self._per_slab = max(1, SLAB_BYTES // block_bytes)
        self._slabs = [
            torch.empty(
                (min(self._per_slab, num_blocks - first), *self._pool.shape[1:]),
                dtype=torch.uint8,
                pin_memory=pool.is_cuda,
            )
            for first in range(0, num_blocks, self._per_slab)
        ]
        self._chunk = max(1, CHUNK_BYTES // block_bytes)

    def copy_out(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks here.

        Args:
            pairs: (block, host block); of equal host blocks the last one counts.
        """
        for start in range(0, len(pairs), self._chunk):
            part = pairs[start : start + self._chunk]
            gathered = self._pool.index_select(0, self._index([block for block, _ in part]))
            for row, (_, host_block) in enumerate(part):
                self._block(host_block).copy_(gathered[row], non_blocking=True)

    def copy_in(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks back.

        Args:
            pairs: (host block, block); no block comes twice.
        """
        for start in range(0, len(pairs), self._chunk):
            part = pairs[start : start + self._chunk]
            gathered = torch.empty(
                (len(part), *self._pool.shape[1:]), dtype=torch.uint8, device=self._pool.device
            )
            for row, (host_block, _) in enumerate(part):
                gathered[row].copy_(self._block(host_block), non_blocking=True)
            self._pool.index_copy_(0, self._index([block for _, block in part]), gathered)

    def measure_copy_in(self) -> float:
        """Seconds that copying a block back takes; overwrites the first blocks of both tiers."""
        count = min(self._chunk, self.num_blocks, len(self._pool))
        pairs = [(block, block) for block in range(count)]
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            self.copy_in(pairs)
            if self._pool.is_cuda:
                torch.cuda.synchronize(self._pool.device)
            best = min(best, time.perf_counter() - start)
        return best / count

    def _block(self, host_block: int) -> torch.Tensor:
        slab, row = divmod(host_block, self._per_slab)
        return self._slabs[slab][row]

    def _index(self, blocks: list[int]) -> torch.Tensor:
        return torch.tensor(blocks).to(self._pool.device, non_blocking=True)
