"""Sums over GPUs by size, in each way that there is: NCCL, our kernel in one shot, two, plainly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nano_vllm.distributed.collectives import GroupCollectives
    from nano_vllm.distributed.peer_memory import PeerMemory

START = "torchrun --nproc_per_node=N -m nano_vllm.bench all_reduce"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=[8, 64, 128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 65536],
        metavar="KIB",
        help="of each rank's tensor; our kernel sums 8 MiB in a call",
    )
    parser.add_argument("--hidden-size", type=int, default=4096, help="elements of a row, bfloat16")


def run(args: argparse.Namespace) -> None:
    import torch

    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.distributed.all_reduce_way import SLICE_BYTES, largest_call
    from nano_vllm.distributed.collectives import GroupCollectives
    from nano_vllm.distributed.launch import Launch
    from nano_vllm.distributed.peer_memory import PeerMemory
    from nano_vllm.distributed.process_groups import join, process_space

    row_bytes = 2 * args.hidden_size
    if args.hidden_size < 8 or args.hidden_size % 8 or args.hidden_size > 1 << 15:
        raise ValueError(
            f"--hidden-size must be a multiple of 8 up to 32768, got {args.hidden_size}"
        )
    for size in args.sizes:
        if size < 1 or size * 1024 % row_bytes:
            raise ValueError(f"--sizes must be whole rows of {row_bytes} bytes, got {size} KiB")
    launch = Launch.from_environment()
    if launch.world_size == 1:
        raise ValueError(f"all_reduce needs several GPUs, got one process: {START}")
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    parallel = join(launch, device, launch.world_size, 1)
    assert isinstance(parallel.tp, GroupCollectives)
    largest = min(max(args.sizes) * 1024, SLICE_BYTES)
    # one shot takes the most room
    max_bytes = max(largest * launch.world_size // 2, largest_call(launch.world_size))
    peers = PeerMemory.connect(
        parallel.tp.all_gather,
        launch.rank,
        launch.world_size,
        device,
        process_space() or str(launch.rank),
        max_bytes,
    )
    if peers is None:
        raise ValueError("the GPUs cannot map each other's memory: NCCL sums everything")
    rows = []
    for size in args.sizes:
        rows.append(_row(parallel.tp, peers, size * 1024 // row_bytes, args.hidden_size))
        if launch.rank == 0:
            print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
    if launch.rank == 0:
        machine = describe_machine("cuda") | {"GPUs": launch.world_size, "dtype": "bfloat16"}
        report("all_reduce", machine, rows)
    peers.close()
    parallel.agree(0)  # nobody frees what another one has mapped
    peers.free()
    parallel.close()


def _row(tp: GroupCollectives, peers: PeerMemory, num_rows: int, size: int) -> dict[str, Any]:
    """Microseconds of one sum, in a CUDA graph of many; those of all ways take turns."""
    import torch
    import torch.distributed as dist

    from nano_vllm import ops
    from nano_vllm.bench.timing import alternate, repeat_timer
    from nano_vllm.distributed.all_reduce_way import SLICE_BYTES, Way, slices_of, way_of

    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16
    x = torch.randn(num_rows, size, device=device).to(dtype)
    out, residual, weight = torch.empty_like(x), torch.zeros_like(x), torch.ones_like(x[0])
    eps = 1e-5

    num_bytes = x.numel() * x.element_size()
    slices = slices_of(num_rows, num_bytes // num_rows, SLICE_BYTES)
    ways = (Way.ONE_SHOT, Way.TWO_SHOT, Way.PLAIN)

    def ours(way: Way, *norm: Any) -> None:
        for rows in slices:
            more = (residual[rows], *norm) if norm else ()
            ops.all_reduce(
                out[rows], x[rows], peers.buffers, peers.rank, peers.max_bytes, way.value, *more
            )

    expected = tp.all_gather(x).float()
    total = torch.zeros_like(expected[0])
    for rank in range(tp.size):
        total += expected[rank]
    for way in ways:
        ours(way)
        _check(out, total.to(dtype), way.value)
    calls: dict[str, Callable[[], object]] = {
        "NCCL": lambda: dist.all_reduce(out),
        **{way.value: partial(ours, way) for way in ways},
        **{f"{way.value} and norm": partial(ours, way, weight, eps) for way in ways},
        "norm": lambda: ops.fused_add_rms_norm(out, out, residual, weight, eps),
    }
    seconds = alternate([repeat_timer([call], device) for call in calls.values()])
    return {
        "KiB": num_bytes // 1024,
        **{name: round(s * 1e6, 1) for name, s in zip(calls, seconds, strict=True)},
        "taken": way_of(num_bytes, tp.size).value,
    }


def _check(out: torch.Tensor, expected: torch.Tensor, way: str) -> None:
    import torch

    if not torch.equal(out, expected):
        raise ValueError(f"{way}: {int((out != expected).sum())} of {out.numel()} sums are wrong")
