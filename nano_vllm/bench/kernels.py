"""The kernels against the machine's ceilings and against torch's own attention, in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

DECODE_GRID = [(batch, context) for context in (1024, 8192, 32768) for batch in (1, 8, 64, 256)]
DECODE_GRID.remove((256, 32768))  # 34 GB of KV cache, and as much again for the peer
PREFILL_GRID = [(16, 1024), (4, 4096), (1, 8192), (1, 32768)]
CPU_DECODE_GRID = [(1, 512), (16, 512), (1, 4096)]
CPU_PREFILL_GRID = [(1, 512), (4, 256)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    parser.add_argument("--num-heads", type=int, default=None, help="query heads")
    parser.add_argument("--num-kv-heads", type=int, default=None)
    parser.add_argument("--head-dim", type=int, default=None)
    parser.add_argument("--block-size", type=int, default=16, help="tokens per KV block")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name has this")


def run(args: argparse.Namespace) -> None:
    import torch

    from nano_vllm.bench.report import describe_machine, report
    from nano_vllm.bench.timing import copy_ceiling, matmul_ceiling

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    on_gpu = name == "cuda"
    dtype_name = args.dtype if args.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    dtype = getattr(torch, dtype_name)
    # Llama-3-8B's heads on a GPU, SmolLM2-135M's on a CPU
    heads = args.num_heads or (32 if on_gpu else 9)
    kv_heads = args.num_kv_heads or (8 if on_gpu else 3)
    head_dim = args.head_dim or (128 if on_gpu else 64)

    copy, matmul = copy_ceiling(device), matmul_ceiling(device, dtype)
    machine = describe_machine(name)
    machine |= {
        "dtype": dtype_name,
        "heads": f"{heads}/{kv_heads}x{head_dim}",
        "copy GB/s": round(copy / 1e9),
        "matmul TFLOP/s": round(matmul / 1e12, 2),
    }
    decode_grid = DECODE_GRID if on_gpu else CPU_DECODE_GRID
    prefill_grid = PREFILL_GRID if on_gpu else CPU_PREFILL_GRID
    attention = partial(_attention, device, dtype, heads, kv_heads, head_dim, args.block_size)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "paged_attention decode": lambda: [
            attention(batch, 1, context, copy, matmul) for batch, context in decode_grid
        ],
        "paged_attention prefill": lambda: [
            attention(batch, length, length, copy, matmul) for batch, length in prefill_grid
        ],
        "reshape_and_cache copy_blocks": lambda: _cache_ops(
            device, dtype, kv_heads, head_dim, args.block_size, copy
        ),
        "fused_add_rms_norm silu_and_mul": lambda: _layer_ops(
            device, dtype, heads * head_dim, copy
        ),
    }
    rows = [row for names, measure in parts.items() if args.only in names for row in measure()]
    if not rows:
        raise ValueError(f"--only {args.only!r} is in none of the names: {', '.join(parts)}")
    report("kernels", machine, rows)


def _row(
    kernel: str,
    shape: str,
    seconds: float,
    amount: float,
    unit: str,
    ceiling: float,
    peer: float | None,
) -> dict[str, Any]:
    scale = 1e9 if unit == "GB/s" else 1e12
    return {
        "kernel": kernel,
        "shape": shape,
        "us": seconds * 1e6,
        "rate": amount / seconds / scale,
        "unit": unit,
        "of ceiling": amount / seconds / ceiling,
        "torch us": None if peer is None else peer * 1e6,
        "torch / ours": None if peer is None else peer / seconds,
    }


def _attention(
    device: Any,
    dtype: Any,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    batch: int,
    query_len: int,
    context: int,
    copy: float,
    matmul: float,
) -> dict[str, Any]:
    """One paged attention shape; the peer is scaled_dot_product_attention on dense, unpaged
    tensors.
    """
    import torch

    from nano_vllm import ops
    from nano_vllm.bench.timing import input_sets, median_seconds

    blocks_per_seq = -(-context // block_size)
    num_blocks = batch * blocks_per_seq
    kv_bytes = 2 * batch * context * kv_heads * head_dim * dtype.itemsize
    sets = input_sets(kv_bytes, device)
    scale = head_dim**-0.5
    query_start_loc = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
    seq_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    workspace = None
    if device.type == "cuda":
        numel = ops.paged_attention_workspace_numel(batch, heads, head_dim)
        workspace = torch.empty(numel, dtype=torch.float32, device=device)
        ops.plan_attention(
            workspace,
            query_start_loc,
            seq_lens,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_query_len=query_len,
        )
    ours, torchs = [], []
    for _ in range(sets):
        query = torch.randn(batch * query_len, heads, head_dim, device=device, dtype=dtype)
        pool = torch.randn(
            2, num_blocks, kv_heads, block_size, head_dim, device=device, dtype=dtype
        )
        keys, values = pool[0].transpose(1, 2), pool[1].transpose(1, 2)
        tables = torch.randperm(num_blocks, device=device).int().view(batch, blocks_per_seq)
        out = torch.empty_like(query)
        paged = partial(
            ops.paged_attention,
            out,
            query,
            keys,
            values,
            tables,
            query_start_loc,
            seq_lens,
            max_query_len=query_len,
            max_seq_len=context,
            scale=scale,
            workspace=workspace,
            is_planned=workspace is not None,
        )
        q = query.view(batch, query_len, heads, head_dim).transpose(1, 2)
        dense = (batch, kv_heads, context, head_dim)
        k = torch.randn(dense, device=device, dtype=dtype)
        v = torch.randn(dense, device=device, dtype=dtype)
        sdpa = partial(
            torch.nn.functional.scaled_dot_product_attention,
            q,
            k,
            v,
            is_causal=query_len > 1,
            scale=scale,
            enable_gqa=True,
        )
        ours.append(paged)
        torchs.append(sdpa)
    seconds, peer = median_seconds(ours, device), median_seconds(torchs, device)
    if query_len == 1:
        return _row(
            "paged_attention decode", f"{batch} x {context}", seconds, kv_bytes, "GB/s", copy, peer
        )
    flops = 4 * batch * heads * head_dim * query_len * (query_len + 1) / 2
    return _row(
        "paged_attention prefill", f"{batch} x {context}", seconds, flops, "TFLOP/s", matmul, peer
    )


def _cache_ops(
    device: Any, dtype: Any, kv_heads: int, head_dim: int, block_size: int, copy: float
) -> list[dict[str, Any]]:
    import torch

    from nano_vllm import ops
    from nano_vllm.bench.timing import input_sets, median_seconds

    rows = []
    tokens = 8192 if device.type == "cuda" else 2048
    moved = 4 * tokens * kv_heads * head_dim * dtype.itemsize
    calls = []
    for _ in range(input_sets(moved, device)):
        key, value = (
            torch.randn(tokens, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2)
        )
        pool = torch.empty(
            2, tokens // block_size, kv_heads, block_size, head_dim, device=device, dtype=dtype
        )
        slots = torch.randperm(tokens, device=device)
        keys, values = pool[0].transpose(1, 2), pool[1].transpose(1, 2)
        calls.append(partial(ops.reshape_and_cache, key, value, keys, values, slots))
    seconds = median_seconds(calls, device)
    rows.append(_row("reshape_and_cache", f"{tokens} tokens", seconds, moved, "GB/s", copy, None))

    layers, pairs = 32, 256 if device.type == "cuda" else 16
    pool = torch.randn(
        layers, 2, 2 * pairs, kv_heads, block_size, head_dim, device=device, dtype=dtype
    )
    mapping = torch.randperm(2 * pairs, device=device).view(pairs, 2)
    moved = pool.numel() * dtype.itemsize
    seconds = median_seconds([partial(ops.copy_blocks, pool, mapping)], device)
    rows.append(
        _row("copy_blocks", f"{pairs} blocks x {layers} layers", seconds, moved, "GB/s", copy, None)
    )
    return rows


def _layer_ops(device: Any, dtype: Any, hidden: int, copy: float) -> list[dict[str, Any]]:
    import torch

    from nano_vllm import ops
    from nano_vllm.bench.timing import input_sets, median_seconds

    tokens = 8192 if device.type == "cuda" else 1024
    shape = f"{tokens} x {hidden}"
    weight = torch.randn(hidden, device=device, dtype=dtype)
    moved = 4 * tokens * hidden * dtype.itemsize
    pairs = [
        [torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(2)]
        for _ in range(input_sets(moved, device))
    ]
    norms = [partial(ops.fused_add_rms_norm, x, x, r, weight, 1e-5) for x, r in pairs]
    seconds = median_seconds(norms, device)
    rows = [_row("fused_add_rms_norm", shape, seconds, moved, "GB/s", copy, None)]

    moved = 3 * tokens * (hidden // 2) * dtype.itemsize
    gates = [partial(ops.silu_and_mul, r.new_empty(tokens, hidden // 2), r) for _, r in pairs]
    seconds = median_seconds(gates, device)
    peer = median_seconds([partial(_torch_silu_and_mul, r) for _, r in pairs], device)
    rows.append(_row("silu_and_mul", shape, seconds, moved, "GB/s", copy, peer))
    return rows


def _torch_silu_and_mul(gate_up: Any) -> Any:
    import torch

    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
