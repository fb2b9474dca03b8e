"""Times the kernels around attention: the cache's and the layers'."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nano_vllm import ops
from nano_vllm.bench.attention_grid import Heads
from nano_vllm.bench.kernel_row import Setup
from nano_vllm.bench.timing import alternate, input_sets, median_seconds, repeat_timer


def cache_rows(setup: Setup, heads: Heads) -> list[dict[str, Any]]:
    device, dtype, block_size = setup.device, setup.dtype, setup.block_size
    kv_heads, head_dim = heads.num_kv_heads, heads.head_dim
    tokens = 8192 if device.type == "cuda" else 2048
    moved = 4 * tokens * kv_heads * head_dim * dtype.itemsize
    calls = []
    for _ in range(input_sets(moved, device)):
        key, value = (
            torch.randn(tokens, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2)
        )
        pool = torch.empty(
            2, -(-tokens // block_size), kv_heads, block_size, head_dim, device=device, dtype=dtype
        )
        slots = torch.randperm(tokens, device=device)
        keys, values = pool[0].transpose(1, 2), pool[1].transpose(1, 2)
        calls.append(partial(ops.reshape_and_cache, key, value, keys, values, slots))
    seconds = median_seconds(calls, device)
    rows = [
        setup.row("reshape_and_cache", heads, f"{tokens} tokens", seconds, moved=moved),
        _rotary_row(setup, heads, tokens),
    ]

    layers, pairs = 32, 256 if device.type == "cuda" else 16
    pool = torch.randn(
        layers, 2, 2 * pairs, kv_heads, block_size, head_dim, device=device, dtype=dtype
    )
    mapping = torch.randperm(2 * pairs, device=device).view(pairs, 2)
    seconds = median_seconds([partial(ops.copy_blocks, pool, mapping)], device)
    shape = f"{pairs} blocks x {layers} layers"
    moved = pool.numel() * dtype.itemsize
    return [*rows, setup.row("copy_blocks", heads, shape, seconds, moved=moved)]


def _rotary_row(setup: Setup, heads: Heads, tokens: int) -> dict[str, Any]:
    """Queries and keys normalised and rotated, keys and values written into the cache."""
    device, dtype, block_size, dim = setup.device, setup.dtype, setup.block_size, heads.head_dim
    moved = (2 * heads.num_heads + 4 * heads.num_kv_heads) * tokens * dim * dtype.itemsize
    positions = torch.arange(tokens, device=device)
    slots = torch.randperm(tokens, device=device)
    angles = torch.rand(tokens, dim // 2, device=device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    weight = torch.ones(dim, device=device, dtype=dtype)
    calls = []
    for _ in range(input_sets(moved, device)):
        query, key, value = (
            torch.randn(tokens, num_heads, dim, device=device, dtype=dtype)
            for num_heads in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        )
        shape = (2, -(-tokens // block_size), heads.num_kv_heads, block_size, dim)
        keys, values = torch.empty(shape, device=device, dtype=dtype).transpose(2, 3)
        calls.append(
            partial(
                ops.rotary_reshape_and_cache,
                positions,
                query,
                key,
                value,
                keys,
                values,
                slots,
                cos_sin,
                query_norm_weight=weight,
                key_norm_weight=weight,
                norm_eps=1e-6,
            )
        )
    seconds = median_seconds(calls, device)
    return setup.row("rotary_reshape_and_cache", heads, f"{tokens} tokens", seconds, moved=moved)


def layer_rows(setup: Setup, heads: Heads) -> list[dict[str, Any]]:
    """The peer of silu_and_mul and linear is torch, if it is among the peers."""
    device, dtype = setup.device, setup.dtype
    tokens = 8192 if device.type == "cuda" else 1024
    hidden = heads.num_heads * heads.head_dim
    shape = f"{tokens} x {hidden}"
    weight = torch.randn(hidden, device=device, dtype=dtype)
    moved = 4 * tokens * hidden * dtype.itemsize
    pairs = [
        [torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(2)]
        for _ in range(input_sets(moved, device))
    ]
    norms = [partial(ops.fused_add_rms_norm, x, x, r, weight, 1e-5) for x, r in pairs]
    seconds = median_seconds(norms, device)
    rows = [setup.row("fused_add_rms_norm", heads, shape, seconds, moved=moved, is_paged=False)]

    moved = 3 * tokens * (hidden // 2) * dtype.itemsize
    gates = [partial(ops.silu_and_mul, r.new_empty(tokens, hidden // 2), r) for _, r in pairs]
    torchs = [partial(_torch_silu_and_mul, r) for _, r in pairs]
    seconds, peer = alternate([repeat_timer(gates, device), repeat_timer(torchs, device)])
    peers: dict[str, float | None] = {"torch": peer}
    return [
        *rows,
        setup.row("silu_and_mul", heads, shape, seconds, moved=moved, is_paged=False, peers=peers),
        *_linear_rows(setup, heads),
        *_gated_rows(setup, heads),
        *_qkv_rows(setup, heads),
    ]


def _linear_rows(setup: Setup, heads: Heads) -> list[dict[str, Any]]:
    """A decode's largest product, of a hidden size by three times as much; bytes of the weight."""
    device, hidden = setup.device, heads.num_heads * heads.head_dim
    moved = 3 * hidden * hidden * setup.dtype.itemsize
    weights = [
        torch.randn(3 * hidden, hidden, device=device, dtype=setup.dtype)
        for _ in range(input_sets(moved, device))
    ]
    rows = []
    for num_rows in (1, 8, 32):
        if num_rows > ops.linear_max_rows(weights[0]):
            continue
        x = torch.randn(num_rows, hidden, device=device, dtype=setup.dtype)
        out = x.new_empty(num_rows, 3 * hidden)
        if device.type == "cuda":
            torch.cuda.synchronize()  # the weights are at rest
        ours = [partial(ops.linear, out, x, weight) for weight in weights]
        torchs = [partial(torch.mm, x, weight.T, out=out) for weight in weights]
        seconds, peer = alternate([repeat_timer(ours, device), repeat_timer(torchs, device)])
        shape = f"{num_rows} x {hidden} x {3 * hidden}"
        peers: dict[str, float | None] = {"torch": peer}
        rows.append(
            setup.row("linear", heads, shape, seconds, moved=moved, is_paged=False, peers=peers)
        )
    return rows


def _gated_rows(setup: Setup, heads: Heads) -> list[dict[str, Any]]:
    """Products by gate and up, of a hidden size by three times as much each, with the activation;
    torch's has our `silu_and_mul` behind it.
    """
    device, hidden = setup.device, heads.num_heads * heads.head_dim
    if device.type != "cuda":
        return []
    weight = torch.randn(6 * hidden, hidden, device=device, dtype=setup.dtype) * hidden**-0.5
    if not ops.linear_silu_and_mul_pays(weight, 1) or 3 * hidden % 32:
        return []
    rows = []
    for num_rows in (128, 256, 2048, 8192):
        x = torch.randn(num_rows, hidden, device=device, dtype=setup.dtype)
        gate_up, out = x.new_empty(num_rows, 6 * hidden), x.new_empty(num_rows, 3 * hidden)
        torch.cuda.synchronize()  # the weights are at rest

        def by_torch(
            x: torch.Tensor = x, gate_up: torch.Tensor = gate_up, out: torch.Tensor = out
        ) -> None:
            torch.mm(x, weight.T, out=gate_up)
            ops.silu_and_mul(out, gate_up)

        ours = partial(ops.linear_silu_and_mul, out, x, weight)
        timers = [repeat_timer([call], device) for call in (ours, by_torch)]
        seconds, peer = alternate(timers)
        rows.append(
            setup.row(
                "linear_silu_and_mul",
                heads,
                f"{num_rows} x {hidden} x 2 x {3 * hidden}",
                seconds,
                flops=2 * num_rows * hidden * 6 * hidden,
                is_paged=False,
                peers={"torch": peer},
            )
        )
    return rows


def _qkv_rows(setup: Setup, heads: Heads) -> list[dict[str, Any]]:
    """The projection of a hidden size to queries, keys and values, with their norms and rotation
    and the write into the cache; torch's has our `rotary_reshape_and_cache` behind it.
    """
    device, dim = setup.device, heads.head_dim
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    hidden, out_features = heads.num_heads * dim, sum(counts) * dim
    weight = torch.randn(out_features, hidden, device=device, dtype=setup.dtype) * hidden**-0.5
    rows = []
    for num_rows in (512, 2048, 8192):
        if not ops.qkv_linear_pays(weight, num_rows, dim):
            continue
        x = torch.randn(num_rows, hidden, device=device, dtype=setup.dtype)
        qkv = x.new_empty(num_rows, out_features)
        heads_of = qkv.view(num_rows, -1, dim).split(counts, dim=1)
        query = x.new_empty(num_rows, heads.num_heads, dim)
        shape = (2, -(-num_rows // setup.block_size), heads.num_kv_heads, setup.block_size, dim)
        cache = torch.empty(shape, device=device, dtype=setup.dtype).transpose(2, 3)
        slots, positions = (torch.arange(num_rows, device=device) for _ in range(2))
        cos_sin = torch.randn(num_rows, dim, device=device)
        norm = torch.ones(dim, device=device, dtype=setup.dtype)
        norms: dict[str, Any] = {
            "query_norm_weight": norm,
            "key_norm_weight": norm,
            "norm_eps": 1e-6,
        }
        where = *cache, slots, cos_sin
        torch.cuda.synchronize()  # the weights are at rest
        ours = partial(ops.qkv_linear, query, x, weight, None, positions, *where, **norms)
        product = partial(torch.mm, x, weight.T, out=qkv)
        behind = partial(ops.rotary_reshape_and_cache, positions, *heads_of, *where, **norms)

        def by_torch(product: Any = product, behind: Any = behind) -> None:
            product()
            behind()

        timers = [repeat_timer([call], device) for call in (ours, by_torch)]
        seconds, peer = alternate(timers)
        rows.append(
            setup.row(
                "qkv_linear",
                heads,
                f"{num_rows} x {hidden} x {out_features}",
                seconds,
                flops=2 * num_rows * hidden * out_features,
                peers={"torch": peer},
            )
        )
    return rows


def _torch_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
