"""The kernels against the machine's ceilings and against torch's own attention, in one run."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

DECODE_GRID = [(1, 1024), (8, 1024), (64, 1024), (1, 8192), (8, 8192), (64, 8192), (1, 32768)]
PREFILL_GRID = [(16, 1024), (4, 4096), (1, 8192)]
CPU_DECODE_GRID = [(1, 512), (16, 512), (1, 4096)]
CPU_PREFILL_GRID = [(1, 512), (4, 256)]
BLOCK_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16")
    )
    parser.add_argument("--num-heads", type=int, default=None, help="query heads")
    parser.add_argument("--num-kv-heads", type=int, default=None)
    parser.add_argument("--head-dim", type=int, default=None)


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
    rows: list[dict[str, Any]] = []
    for batch, context in DECODE_GRID if on_gpu else CPU_DECODE_GRID:
        rows.append(
            _attention(device, dtype, heads, kv_heads, head_dim, batch, 1, context, copy, matmul)
        )
    for batch, length in PREFILL_GRID if on_gpu else CPU_PREFILL_GRID:
        rows.append(
            _attention(
                device, dtype, heads, kv_heads, head_dim, batch, length, length, copy, matmul
            )
        )
    rows += _cache_ops(device, dtype, kv_heads, head_dim, copy)
    rows += _layer_ops(device, dtype, heads * head_dim, copy)
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

    blocks_per_seq = -(-context // BLOCK_SIZE)
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
    ours, torchs = [], []
    for _ in range(sets):
        query = torch.randn(batch * query_len, heads, head_dim, device=device, dtype=dtype)
        pool = torch.randn(
            2, num_blocks, kv_heads, BLOCK_SIZE, head_dim, device=device, dtype=dtype
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
    device: Any, dtype: Any, kv_heads: int, head_dim: int, copy: float
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
            2, tokens // BLOCK_SIZE, kv_heads, BLOCK_SIZE, head_dim, device=device, dtype=dtype
        )
        slots = torch.randperm(tokens, device=device)
        keys, values = pool[0].transpose(1, 2), pool[1].transpose(1, 2)
        calls.append(partial(ops.reshape_and_cache, key, value, keys, values, slots))
    seconds = median_seconds(calls, device)
    rows.append(_row("reshape_and_cache", f"{tokens} tokens", seconds, moved, "GB/s", copy, None))

    layers, pairs = 32, 256 if device.type == "cuda" else 16
    pool = torch.randn(
        layers, 2, 2 * pairs, kv_heads, BLOCK_SIZE, head_dim, device=device, dtype=dtype
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
