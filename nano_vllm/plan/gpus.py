"""What the GPUs and the links between them can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True)
class Links:
    """Between GPUs, in bytes per second and seconds. Assumptions, from published figures of others
    (docs/distributed.md names them), until measured here.
    """

    send: float
    """From one GPU to another of its host, by NCCL or by an all-reduce that reads their memory."""
    bus: float
    """Bus bandwidth of NCCL's all-reduce within a host, as nccl-tests define it."""
    has_peer_kernels: bool
    """Whether GPUs can read each other's memory quickly enough for all-reduces of one or two steps
    (one-shot, two-shot).
    """
    nccl_latency: float = 20e-6
    """Of a small all-reduce within a host."""
    one_shot_latency: float = 4e-6
    one_shot_latency_per_gpu: float = 0.25e-6
    two_shot_latency: float = 13e-6
    two_shot_bus: float = 220e9
    send_latency: float = 10e-6
    """Of NCCL's send and receive within a host."""
    network: float = 47e9
    """Of a GPU's share of the network between hosts: NDR InfiniBand, 400 Gb/s for each GPU."""
    network_latency: float = 15e-6
    """Of a send to another host."""
    hosts_latency: float = 30e-6
    """Of a small all-reduce over several hosts."""


NVLINK_4 = Links(send=390e9, bus=300e9, has_peer_kernels=True)
NVLINK_3 = Links(send=260e9, bus=230e9, has_peer_kernels=True, two_shot_bus=150e9)
PCIE_4 = Links(send=24e9, bus=20e9, has_peer_kernels=False, network=22e9)


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
