"""What the GPUs and the links between them can do."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nano_vllm.distributed.all_reduce_way import HOP_SECONDS, PLAIN_RATE, PLAIN_SECONDS, RATE

GIB = 1 << 30


@dataclass(frozen=True)
class Links:
    """Between GPUs, in bytes per second and seconds; docs/distributed.md says where from."""

    send: float
    """From one GPU to another of its host, by NCCL."""
    bus: float
    """Bus bandwidth of NCCL's all-reduce within a host, as nccl-tests define it."""
    peer: float | None
    """What leaves a GPU in an all-reduce by our kernel, besides the flags; None where GPUs cannot
    write each other's memory quickly enough.
    """
    plain: float = PLAIN_RATE
    """The same where there are no flags beside the data."""
    source: str = "assumed"
    """Of the figures of all-reduces within a host. All others are assumed."""
    nccl_latency: float = 17e-6
    """Of a small all-reduce within a host."""
    one_shot_latency: float = 2.1e-6
    one_shot_latency_per_gpu: float = 0.25e-6
    two_shot_latency: float = HOP_SECONDS
    """Beyond that of one shot."""
    plain_latency: float = PLAIN_SECONDS
    """Beyond that of one shot."""
    send_latency: float = 10e-6
    """Of NCCL's send and receive within a host."""
    network: float = 47e9
    """Of a GPU's share of the network between hosts: NDR InfiniBand, 400 Gb/s for each GPU."""
    network_latency: float = 15e-6
    """Of a send to another host."""
    hosts_latency: float = 30e-6
    """Of a small all-reduce over several hosts."""


NVLINK_4 = Links(send=390e9, bus=230e9, peer=RATE, source="measured between two GPUs")
NVLINK_3 = Links(send=260e9, bus=150e9, peer=RATE * 2 / 3, plain=PLAIN_RATE * 2 / 3)
PCIE_4 = Links(send=24e9, bus=20e9, peer=None, network=22e9)


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    memory: int
    """Bytes, as the driver tells: less than what is printed on the box."""
    copy: float
    """Bytes per second, read and written, of a large copy."""
    matmul: float
    """Operations per second of a large product in 16 bits."""
    links: Links
    is_measured: bool = False
    """Whether copy and matmul were measured with this project's benchmarks; else they are
    COPY_SHARE and MATMUL_SHARE of the data sheet's figures.
    """


COPY_SHARE, MATMUL_SHARE = 0.90, 0.79
"""What an H100 reaches of its data sheet's 3.35 TB/s and 989 TFLOP/s."""


def _by_data_sheet(name: str, memory: float, copy: float, matmul: float, links: Links) -> GPU:
    return GPU(name, int(memory * GIB), copy * COPY_SHARE, matmul * MATMUL_SHARE, links)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", int(79.1 * GIB), 3.02e12, 785e12, NVLINK_4, is_measured=True),
        GPU("h200", int(139.8 * GIB), 3.82e12, 785e12, NVLINK_4, is_measured=True),
        _by_data_sheet("a100-80gb", 79.1, 2.039e12, 312e12, NVLINK_3),
        _by_data_sheet("a100-40gb", 39.4, 1.555e12, 312e12, NVLINK_3),
        _by_data_sheet("l40s", 44.4, 0.864e12, 362e12, PCIE_4),
        _by_data_sheet("l4", 22.0, 0.300e12, 121e12, PCIE_4),
        _by_data_sheet("rtx-4090", 23.6, 1.008e12, 165e12, PCIE_4),
    )
}
"""By name; bandwidths and operations of the data sheets without sparsity, summed in 32 bits."""


def gpu_of(device_name: str, memory: int) -> GPU:
    """The GPU that a driver calls so ("NVIDIA H100 80GB HBM3"), with the memory that it has. One
    that is not known is thought to compute as much for each byte that it reads as an H100.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    known = (gpu for gpu in GPUS.values() if words.issuperset(gpu.name.split("-")))
    return replace(next(known, GPUS["h100"]), memory=memory)


def find_gpu(name: str, memory: float | None = None) -> GPU:
    """The GPU of a name, with another amount of memory (GiB) where one is given; ValueError names
    those that are known.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    if memory is None:
        return GPUS[name]
    if not 0 < memory < 1 << 20:
        raise ValueError(f"gpu_memory must be GiB, more than 0, got {memory!r}")
    return replace(GPUS[name], memory=int(memory * GIB))
