"""Sums over the GPUs of one host by our own kernel, for what is too small for NCCL to be quick."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from nano_vllm import ops

MAX_PEERS = 8
MAX_BYTES = 1 << 20
"""Of a message. Each rank sends all of it to every other one, with as many bytes of flags."""
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
    """

    def __init__(self, buffers: torch.Tensor, rank: int, device: torch.device) -> None:
        self._buffers = buffers
        self._rank = rank
        self._device = device

    @classmethod
    def connect(
        cls, all_gather: AllGather, rank: int, num_ranks: int, device: torch.device, host: str
    ) -> PeerMemory | None:
        """None, on all ranks, where one of them cannot map another's memory.

        Args:
            all_gather: of the ranks.
            rank: this one among them.
            num_ranks: how many they are.
            device: a GPU.
            host: what names the host.
        """
        if num_ranks > MAX_PEERS:
            return None
        digest = hashlib.sha256(host.encode()).digest()[:_HOST_BYTES]
        own = torch.zeros(_HANDLE_BYTES + _HOST_BYTES, dtype=torch.uint8)
        own[_HANDLE_BYTES:] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        like = torch.empty(0, device=device)
        buffer = ops.allocate_peer_buffer(like, ops.peer_buffer_bytes(MAX_BYTES, num_ranks))
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
            return cls(torch.tensor(addresses, dtype=torch.int64), rank, device)
        for address in mapped.values():
            ops.release_peer_buffer(like, address, is_own=False)
        all_gather(is_whole)  # nobody frees what another one has mapped
        ops.release_peer_buffer(like, buffer, is_own=True)
        return None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` can sum it."""
        row_bytes = x.shape[-1] * x.element_size()
        return (
            x.dim() == 2
            and x.is_contiguous()
            and row_bytes % 16 == 0
            and row_bytes <= _MAX_ROW_BYTES
            and x.numel() * x.element_size() <= MAX_BYTES
        )

    def all_reduce(self, x: torch.Tensor) -> None:
        """The sum over all ranks, in place."""
        ops.all_reduce(x, x, self._buffers, self._rank, MAX_BYTES)

    def all_reduce_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """residual += the sum over all ranks; x becomes the norm of that."""
        ops.all_reduce(x, x, self._buffers, self._rank, MAX_BYTES, residual, weight, eps)

    def close(self) -> None:
        """Once no rank computes any more. The others' memory first: it is freed by them."""
        torch.cuda.synchronize(self._device)
        like = torch.empty(0, device=self._device)
        for rank, address in enumerate(self._buffers.tolist()):
            if rank != self._rank:
                ops.release_peer_buffer(like, address, is_own=False)

    def free(self) -> None:
        """Once no rank has it mapped any more."""
        like = torch.empty(0, device=self._device)
        own = int(self._buffers[self._rank])
        ops.release_peer_buffer(like, own, is_own=True)
