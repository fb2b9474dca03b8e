"""The ranks that run one model together: torchrun's processes as groups of torch.distributed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nano_vllm.distributed.collectives import ALONE, Collectives, GroupCollectives, PeerError
from nano_vllm.distributed.control import Control
from nano_vllm.distributed.interfaces import bind_libraries
from nano_vllm.distributed.launch import Launch
from nano_vllm.distributed.peer_memory import PeerMemory
from nano_vllm.distributed.pipeline import ONE_STAGE, Pipeline, PipelineRank
from nano_vllm.distributed.preflight import check_device, compare
from nano_vllm.distributed.progress import Progress
from nano_vllm.distributed.step_channel import GlooChannel, SharedMemoryChannel, StepChannel
from nano_vllm.distributed.watchdog import SILENCE_SECONDS, Watchdog, process_space

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""The watchdog is quicker wherever it can be; this ends a device that hangs by itself."""


class ParallelState:
    """This process alone: no group, nothing to wait for."""

    rank = 0
    size = 1
    tp: Collectives = ALONE
    """Those who share this rank's layers."""
    pipeline: Pipeline = ONE_STAGE
    are_capturable = True
    """Whether collectives may be part of a CUDA graph."""
    has_failed = False
    """Whether this rank or another is out of step: nothing can be computed any more."""

    def __init__(self) -> None:
        self.progress = Progress()

    def compare(self, facts: dict[str, str]) -> None:
        """Raise ValueError, on all ranks, where one has other facts than the first; it says which
        rank, on which host, and in what.
        """

    def agree(self, *values: int) -> list[int]:
        """The smallest of all ranks, of each value."""
        return list(values)

    def step_channel(self, capacity: int) -> StepChannel | None:
        """From the first rank to the others, for messages of so many bytes; None for a rank that is
        alone.
        """
        return None

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends. Where the error comes of another rank's end, that one
        is to be named: the watchdog ends this process.
        """

    def close(self) -> None:
        """Leave the groups; the other ranks do it too."""


class Member(ParallelState):
    """One of several ranks.

    Args:
        launch: who this is.
        device: that computes.
        tensor_parallel_size: ranks that share layers.
        num_stages: of the pipeline.
    """

    def __init__(
        self, launch: Launch, device: torch.device, tensor_parallel_size: int, num_stages: int
    ) -> None:
        super().__init__()
        self.rank, self.size = launch.rank, launch.world_size
        through_host = launch.shares_gpus
        self.are_capturable = not through_host
        bind_libraries(launch.address, launch.port)
        # Not every host's drivers let several processes use NVLink multicast.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        self._store = _connect(launch, hosts=launch.rank == 0 and not launch.is_under_agent)
        self._watchdog = Watchdog(
            _connect(launch, hosts=False),
            launch.rank,
            launch.world_size,
            socket.gethostname(),
            self.progress,
            not launch.is_under_agent,
        )
        by_nccl = device.type == "cuda" and not through_host
        dist.init_process_group(
            "nccl" if by_nccl else "gloo",
            store=dist.PrefixStore("groups", self._store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if by_nccl else None,
        )
        self._control = Control(self.progress)
        if tensor_parallel_size > 1:
            group = self._tensor_group(tensor_parallel_size)
            self.tp = GroupCollectives(group, self.progress, through_host)
            if by_nccl:
                self.tp.peers = PeerMemory.connect(
                    self.tp.all_gather,
                    self.tp.rank,
                    self.tp.size,
                    device,
                    process_space() or str(self.rank),
                )
        if num_stages > 1:
            self.pipeline = PipelineRank(
                self.rank, tensor_parallel_size, num_stages, self.progress, through_host
            )
        check_device(self.tp, device)

    def _tensor_group(self, size: int) -> Any:
        """The group of the ranks that share this one's layers."""
        if size == self.size:
            return dist.group.WORLD
        groups = [dist.new_group(range(i, i + size)) for i in range(0, self.size, size)]
        return groups[self.rank // size]

    def compare(self, facts: dict[str, str]) -> None:
        compare(self._store, self.rank, self.size, facts)

    def agree(self, *values: int) -> list[int]:
        return self._control.minimum(list(values))

    def step_channel(self, capacity: int) -> StepChannel:
        return self._shared_memory(capacity) or GlooChannel(self._control)

    def _shared_memory(self, capacity: int) -> StepChannel | None:
        """None where some rank cannot open it."""
        fd = -1
        if self.rank == 0 and SharedMemoryChannel.is_supported():
            fd = SharedMemoryChannel.create(capacity, self.size)
        if self.rank == 0:
            self._store.set("steps", json.dumps([process_space(), os.getpid(), fd]))
        else:
            space, pid, theirs = json.loads(self._store.get("steps"))
            if theirs >= 0 and space and space == process_space():
                with contextlib.suppress(OSError):
                    fd = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
        (everyone,) = self.agree(fd)
        try:
            if everyone < 0:
                return None
            return SharedMemoryChannel(fd, self.rank, self.size, self.progress)
        finally:
            if fd >= 0:
                os.close(fd)

    def fail(self, error: BaseException) -> None:
        self.has_failed = True
        if isinstance(error, PeerError):
            time.sleep(SILENCE_SECONDS + 2)
        self._watchdog.tell_failure(error)

    def close(self) -> None:
        if self.has_failed:
            return
        peers = self.tp.peers if isinstance(self.tp, GroupCollectives) else None
        if peers is not None:
            peers.close()
        self.agree(0)  # nobody leaves while another one could miss it
        if peers is not None:
            peers.free()
        self._watchdog.close()
        dist.destroy_process_group()


def join(
    launch: Launch, device: torch.device, tensor_parallel_size: int, num_stages: int
) -> ParallelState:
    """Meet the other ranks, if there are any; returns once all are here."""
    if launch.world_size == 1:
        return ParallelState()
    return Member(launch, device, tensor_parallel_size, num_stages)


def _connect(launch: Launch, hosts: bool) -> dist.Store:
    # The store listens at all addresses of a host unless it is given a socket.
    store = dist.TCPStore(
        launch.address,
        launch.port,
        is_master=hosts,
        timeout=RENDEZVOUS_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=_listen(launch) if hosts else None,
    )
    return dist.PrefixStore(f"nano_vllm/{launch.attempt}", store)


def _listen(launch: Launch) -> int:
    """A socket that is bound to the address given, and to no other."""
    family, _, _, _, address = socket.getaddrinfo(
        launch.address, launch.port, type=socket.SOCK_STREAM
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(os.cpu_count() or 1)
    return listener.detach()
