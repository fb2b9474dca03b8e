"""The kernels against the machine's ceilings and against the attention of others, in one run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from nano_vllm.bench import attention_grid
from nano_vllm.bench.attention_grid import MODELS, Heads

if TYPE_CHECKING:
    from nano_vllm.bench.kernel_row import Setup

PEERS = ("flashinfer", "fa3", "fa3-fwd", "torch")
PARTS = (
    "paged_attention decode",
    "paged_attention prefill",
    "paged_attention mixed",
    "reshape_and_cache rotary_reshape_and_cache copy_blocks",
    "fused_add_rms_norm silu_and_mul linear linear_silu_and_mul qkv_linear",
    "sample_tokens",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=(*MODELS, "all"),
        help="whose heads (default: llama-8b, on a CPU smollm2)",
    )
    parser.add_argument("--num-heads", type=int, default=None, help="query heads, for all models")
    parser.add_argument("--num-kv-heads", type=int, default=None, help="for all models")
    parser.add_argument("--head-dim", type=int, default=None, help="for all models")
    parser.add_argument(
        "--block-sizes",
        nargs="+",
        type=int,
        default=[16],
        metavar="N",
        help="tokens per KV block; each shape once for each",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has this")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        help="attention to compare with (default: all that are installed)",
    )
    parser.add_argument(
        "--fp8-cache",
        action="store_true",
        help="time attention over a float8 KV cache beside that over one of the dtype",
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from nano_vllm.bench.attention_peers import find_peers
    from nano_vllm.bench.kernel_row import Setup, table_line
    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.bench.timing import copy_ceiling, matmul_ceiling

    if not any(args.only in part for part in PARTS):
        raise ValueError(f"--only {args.only!r} is in none of the names: {', '.join(PARTS)}")
    block_sizes = list(dict.fromkeys(args.block_sizes))
    for size in block_sizes:
        if size % 8 or not 8 <= size <= 256:
            raise ValueError(f"--block-sizes must be multiples of 8 from 8 to 256, got {size}")
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = name == "cuda"
    models = chosen_heads(args, on_gpu)
    dtype_name = args.dtype if args.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    device, dtype = torch.device(name), getattr(torch, dtype_name)
    peers = find_peers(PEERS, args.peers, on_gpu)
    copy, matmul = copy_ceiling(device), matmul_ceiling(device, dtype)
    setups = [
        Setup(device, dtype, size, copy, matmul, peers, args.fp8_cache) for size in block_sizes
    ]
    names = setups[0].compared
    rows = []
    for row in _all_rows(setups, models, args.only):
        rows.append(row)
        # a run takes minutes, and a peer can take the process down with it
        print(*table_line(row, names).values(), sep="  ", file=sys.stderr, flush=True)
    if not rows:
        raise ValueError("no shape fits the free memory")
    machine = describe_machine(name) | {
        "dtype": dtype_name,
        "copy GB/s": round(copy / 1e9),
        "matmul TFLOP/s": round(matmul / 1e12, 2),
        "peers": "; ".join(map(str, peers)) or "none",
    }
    report("kernels", machine, rows, [table_line(row, names) for row in rows])


def chosen_heads(args: argparse.Namespace, on_gpu: bool) -> list[Heads]:
    """The heads of the models named, with those numbers replaced that have an option of their own;
    none twice.
    """
    names = args.models or ["llama-8b" if on_gpu else "smollm2"]
    given = {
        name: value
        for name in ("num_heads", "num_kv_heads", "head_dim")
        if (value := getattr(args, name)) is not None
    }
    models = [replace(MODELS[name], **given) for name in (MODELS if "all" in names else names)]
    for heads in models:
        if min(heads.num_heads, heads.num_kv_heads, heads.head_dim) < 1:
            raise ValueError(f"heads and head_dim must be at least 1, got {heads}")
        if heads.num_heads % heads.num_kv_heads:
            raise ValueError(
                f"--num-heads must be a multiple of --num-kv-heads, got {heads.num_heads} "
                f"and {heads.num_kv_heads}"
            )
    return list(dict.fromkeys(models))


def _all_rows(setups: list[Setup], models: list[Heads], only: str) -> Iterator[dict[str, Any]]:
    from nano_vllm.bench.sampling_rows import sampling_rows

    for heads in models:
        yield from _rows(setups, heads, only)
    if only in PARTS[-1]:
        yield from sampling_rows(setups[0])


def _rows(setups: list[Setup], heads: Heads, only: str) -> Iterator[dict[str, Any]]:
    """Each shape in all setups, one after the other, so that the card is as hot for each.

    Args:
        setups: the same but for their block sizes.
    """
    from nano_vllm.bench.attention_rows import attention_row
    from nano_vllm.bench.layer_rows import cache_rows, layer_rows

    decode, prefill, mixed, cache, layer, _ = (only in part for part in PARTS)
    on_gpu = setups[0].device.type == "cuda"
    shapes = []
    if decode:
        shapes += attention_grid.DECODES if on_gpu else attention_grid.CPU_DECODES
    if prefill:
        shapes += attention_grid.PREFILLS if on_gpu else attention_grid.CPU_PREFILLS
    if mixed:
        shapes += attention_grid.MIXES if on_gpu else attention_grid.CPU_MIXES
    for shape, setup in product(shapes, setups):
        row = attention_row(setup, heads, shape)
        if row is not None:
            yield row
    if cache:
        for setup in setups:
            yield from cache_rows(setup, heads)
    if layer:
        yield from layer_rows(setups[0], heads)
