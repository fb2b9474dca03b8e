"""Sums over the GPUs of one host by our own kernel, for what is too small for NCCL to be quick."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from nano_vllm import ops
from nano_vllm.distributed.all_reduce_way import MAX_RANKS, Way, largest_call, slices_of, way_of

_MAX_ROW_BYTES = 1 << 16
"""As many vectors of 16 bytes as the threads of a block keep."""
_HANDLE_BYTES, _HOST_BYTES = 64, 16

AllGather = Callable[[torch.Tensor], torch.Tensor]
"""[...] -> [num_ranks, ...], on the device; the same for all ranks."""


class PeerMemory:
    """Buffers that the ranks map from each other; see csrc/distributed/all_reduce.h.

    Args:
        buffers: [num_ranks], int64, on the CPU; addresses, by rank.
        rank: which of them is its own.
        device: of its own.
        max_bytes: of the largest call.
    """

    def __init__(
        self, buffers: torch.Tensor, rank: int, device: torch.device, max_bytes: int
    ) -> None:
        self.buffers = buffers
        self.rank = rank
        self.max_bytes = max_bytes
        self._device = device

    @classmethod
    def connect(
        cls,
        all_gather: AllGather,
        rank: int,
        num_ranks: int,
        device: torch.device,
        host: str,
        max_bytes: int | None = None,
    ) -> PeerMemory | None:
        """None, on all ranks, where one of them cannot map another's memory, or where their GPUs
        are not alike: blocks wait for those of the same number of other ranks, of which there are
        as many where GPUs have as many multiprocessors.

        Args:
            all_gather: of the ranks.
            rank: this one among them.
            num_ranks: how many they are.
            device: a GPU.
            host: what names the host.
            max_bytes: of the largest call, if not what is taken of so many ranks.
        """
        if num_ranks > MAX_RANKS:
            return None
        if max_bytes is None:
            max_bytes = largest_call(num_ranks)
        gpu = torch.cuda.get_device_properties(device)
        place = f"{host} {gpu.multi_processor_count}"
        digest = hashlib.sha256(place.encode()).digest()[:_HOST_BYTES]
        own = torch.zeros(_HANDLE_BYTES + _HOST_BYTES, dtype=torch.uint8)
        own[_HANDLE_BYTES:] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        like = torch.empty(0, device=device)
        buffer = ops.allocate_peer_buffer(like, ops.peer_buffer_bytes(max_bytes, num_ranks))
        mapped: dict[int, int] = {}
        try:
            ops.export_peer_buffer(like, own[:_HANDLE_BYTES], buffer)
        except ValueError:
            own.zero_()  # a host of its own
        everyone = all_gather(own.to(device)).cpu()
        try:
            if bool((everyone[:, _HANDLE_BYTES:] == everyone[0, _HANDLE_BYTES:]).all()):
                for peer in set(range(num_ranks)) - {rank}:
                    handle = everyone[peer, :_HANDLE_BYTES].contiguous()
                    mapped[peer] = ops.import_peer_buffer(like, handle)
        except ValueError:
            pass
        is_whole = torch.tensor([len(mapped) == num_ranks - 1], dtype=torch.uint8, device=device)
        if bool(all_gather(is_whole).all()):
            addresses = [mapped.get(peer, buffer) for peer in range(num_ranks)]
            return cls(torch.tensor(addresses, dtype=torch.int64), rank, device, max_bytes)
        for address in mapped.values():
            ops.release_peer_buffer(like, address, is_own=False)
        all_gather(is_whole)  # nobody frees what another one has mapped
        ops.release_peer_buffer(like, buffer, is_own=True)
        return None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` can sum it, in calls one behind the other where it is more than the
        buffers hold, and as quickly as NCCL.
        """
        row_bytes = x.shape[-1] * x.element_size()
        return (
            x.dim() == 2
            and x.is_contiguous()
            and row_bytes % 16 == 0
            and row_bytes <= _MAX_ROW_BYTES
            and self._way(x) is not Way.NCCL
        )

    def all_reduce(self, x: torch.Tensor) -> None:
        """The sum over all ranks, in place."""
        way = self._way(x).value
        for rows in self._slices(x):
            part = x[rows]
            ops.all_reduce(part, part, self.buffers, self.rank, self.max_bytes, way)

    def all_reduce_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """residual += the sum over all ranks; x becomes the norm of that."""
        way = self._way(x).value
        for rows in self._slices(x):
            part, old = x[rows], residual[rows]
            ops.all_reduce(
                part, part, self.buffers, self.rank, self.max_bytes, way, old, weight, eps
            )

    def _way(self, x: torch.Tensor) -> Way:
        return way_of(x.numel() * x.element_size(), len(self.buffers))

    def _slices(self, x: torch.Tensor) -> list[slice]:
        return slices_of(len(x), x.shape[1] * x.element_size(), self.max_bytes)

    def close(self) -> None:
        """Once no rank computes any more. The others' memory first: it is freed by them."""
        torch.cuda.synchronize(self._device)
        like = torch.empty(0, device=self._device)
        for rank, address in enumerate(self.buffers.tolist()):
            if rank != self.rank:
                ops.release_peer_buffer(like, address, is_own=False)

    def free(self) -> None:
        """Once no rank has it mapped any more."""
        like = torch.empty(0, device=self._device)
        own = int(self.buffers[self.rank])
        ops.release_peer_buffer(like, own, is_own=True)
