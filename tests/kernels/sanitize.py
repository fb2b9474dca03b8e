"""Every CUDA op on small shapes, for NVIDIA's sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/kernels/sanitize.py

Without torch's caching, each tensor is an allocation of its own, and memcheck sees an access past
its end. What the ops compute is the other tests' matter.
"""

from __future__ import annotations

import torch

from nano_vllm import ops
from tests.kernels.sampling import adjust_arguments, sample_arguments

BLOCK_SIZE = 8
FLOAT8 = torch.float8_e4m3fn


def normal(*shape: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """At the end of its memory, `offset` elements from its start."""
    numel = torch.Size(shape).numel()
    return torch.randn(offset + numel).to("cuda", dtype)[offset:].view(shape)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def attend(
    lengths: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    offset: int,
    sliding_window: int = 0,
    softcap: float = 0.0,
    prefix: int = 0,
) -> None:
    """Sequences of (query_len, seq_len), their blocks one after the other in the pool; the first
    `prefix` tokens of all in those of the first.
    """
    query_lens = [query_len for query_len, _ in lengths]
    seq_lens = [seq_len for _, seq_len in lengths]
    width = -(-max(seq_lens) // BLOCK_SIZE)
    shape = (len(lengths) * width, BLOCK_SIZE, num_kv_heads, head_dim)
    tables = int32(list(range(shape[0]))).view(len(lengths), width)
    tables[:, : prefix // BLOCK_SIZE] = tables[0, : prefix // BLOCK_SIZE].clone()
    query = normal(sum(query_lens), num_heads, head_dim, dtype=dtype, offset=offset)
    ops.paged_attention(
        torch.empty_like(query),
        query,
        normal(*shape, dtype=cache_dtype, offset=offset),
        normal(*shape, dtype=cache_dtype, offset=offset),
        tables,
        int32([sum(query_lens[:s]) for s in range(len(lengths) + 1)]),
        int32(seq_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        scale=head_dim**-0.5,
        sliding_window=sliding_window,
        softcap=softcap,
        workspace=torch.empty(
            ops.paged_attention_workspace_numel(len(lengths), num_heads, head_dim), device="cuda"
        ),
        **scales(cache_dtype, num_kv_heads),
        shared_prefix=int32([0] * len(lengths) + [prefix] * len(lengths)).view(2, -1)
        if prefix
        else None,
    )


def scales(cache_dtype: torch.dtype, num_kv_heads: int) -> dict[str, torch.Tensor]:
    if cache_dtype != FLOAT8:
        return {}
    return {name: torch.ones(num_kv_heads, device="cuda") for name in ("k_scale", "v_scale")}


def run_attention(dtype: torch.dtype, cache_dtype: torch.dtype, offset: int) -> None:
    decodes, prefills = [(1, 1), (1, 9), (1, 600)], [(1, 17), (9, 9), (3, 70), (0, 0), (40, 40)]
    for head_dim in (64, 80, 96, 128, 192, 256):
        attend(decodes, 3, 1, head_dim, dtype, cache_dtype, offset)
        attend(prefills, 3, 1, head_dim, dtype, cache_dtype, offset)
        attend([(1, 361)] * 5, 3, 1, head_dim, dtype, cache_dtype, offset, prefix=320)
    for heads in ((1, 1), (14, 2), (32, 1)):
        attend(decodes, *heads, 64, dtype, cache_dtype, offset, sliding_window=20)
        attend(prefills, *heads, 64, dtype, cache_dtype, offset, sliding_window=20, softcap=5.0)


def run_cache_ops(dtype: torch.dtype, cache_dtype: torch.dtype, offset: int) -> None:
    key, value = (
        normal(5, 2, 80, dtype=dtype, offset=offset),
        normal(5, 2, 80, dtype=dtype, offset=offset),
    )
    pool = normal(2, 2, 4, BLOCK_SIZE, 2, 80, dtype=cache_dtype, offset=offset)
    slot_mapping = torch.tensor([31, -1, 0, 8, 7], device="cuda")
    ops.reshape_and_cache(key, value, *pool[1], slot_mapping, **scales(cache_dtype, 2))
    weight = normal(80, dtype=dtype, offset=offset)
    positions = torch.tensor([9, 0, 4, 4, 1], device="cuda")
    for rotary_dim in (80, 36, 0):
        cos_sin_cache = normal(10, rotary_dim, dtype=torch.float32, offset=0)
        for is_neox in (True, False):
            for norm_weight in (weight, None):
                ops.rotary_reshape_and_cache(
                    positions,
                    normal(5, 6, 80, dtype=dtype, offset=offset),
                    key,
                    value,
                    *pool[1],
                    slot_mapping,
                    cos_sin_cache,
                    is_neox=is_neox,
                    query_norm_weight=norm_weight,
                    **scales(cache_dtype, 2),
                )
    mapping = torch.tensor([[0, 3], [1, 2]], device="cuda")
    ops.copy_blocks(pool, mapping)
    host = torch.zeros(2, 2, 4, BLOCK_SIZE, 2, 80, dtype=cache_dtype).pin_memory()
    ops.swap_blocks(pool, host, mapping)
    ops.swap_blocks(host, pool, mapping)


def run_layer_ops(dtype: torch.dtype, offset: int) -> None:
    for size in (1, 64, 129, 2048):
        input, weight = (
            normal(3, size, dtype=dtype, offset=offset),
            normal(size, dtype=dtype, offset=offset),
        )
        out = torch.empty_like(input)
        ops.rms_norm(out, input, weight, 1e-6)
        ops.fused_add_rms_norm(input, input, torch.zeros_like(input), weight, 1e-6)
        gate_up = normal(3, 2 * size, dtype=dtype, offset=offset)
        ops.silu_and_mul(out, gate_up)
        ops.gelu_and_mul(out, gate_up)
        ops.gelu_and_mul(out, gate_up, "tanh")


def run_linear(dtype: torch.dtype) -> None:
    for num_rows in (1, 9, 20, 300):
        for in_features, out_features in ((64, 64), (1032, 96), (512, 544)):
            input = normal(num_rows, in_features, dtype=dtype, offset=0)
            weight = normal(2 * out_features, in_features, dtype=dtype, offset=0)
            torch.cuda.synchronize()
            out = input.new_empty(num_rows, out_features)
            if num_rows <= ops.linear_max_rows(weight):
                ops.linear(out, input, weight[:out_features])
            ops.linear_silu_and_mul(out, input, weight)


def run_qkv_linear(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    for num_rows in (5, 140, 300):
        for head_dim, num_heads, num_kv_heads in ((64, 3, 1), (128, 4, 2)):
            input = normal(num_rows, 136, dtype=dtype, offset=0)
            rows = (num_heads + 2 * num_kv_heads) * head_dim
            weight, bias = (
                normal(rows, *columns, dtype=dtype, offset=0) for columns in ((136,), ())
            )
            pool = normal(
                2, num_rows // BLOCK_SIZE + 1, BLOCK_SIZE, num_kv_heads, head_dim,
                dtype=cache_dtype, offset=0,
            )  # fmt: skip
            norm_weight = normal(head_dim, dtype=dtype, offset=0)
            torch.cuda.synchronize()
            ops.qkv_linear(
                input.new_empty(num_rows, num_heads, head_dim),
                input,
                weight,
                bias,
                torch.arange(num_rows, device="cuda"),
                *pool,
                torch.arange(num_rows, device="cuda") - 1,
                normal(num_rows, head_dim, dtype=torch.float32, offset=0),
                query_norm_weight=norm_weight,
                **scales(cache_dtype, num_kv_heads),
            )


def run_sampling(dtype: torch.dtype, offset: int) -> None:
    for vocab_size in (1, 100, 1032, 40_001):
        logits = normal(6, vocab_size, dtype=dtype, offset=offset)
        said = [[0] * 5, [0, vocab_size - 1] * 20]
        adjusted = torch.empty(2, vocab_size, device="cuda")
        ops.adjust_logits(
            adjusted,
            **adjust_arguments(
                logits,
                said,
                [2, 3],
                [5, 1],
                repetition=[1.5, 1.0],
                frequency=[0.5, 0.5],
                presence=[0.0, 0.5],
                bias=[{0: 1.0}, {}],
                allowed=[[], [0]],
                ends=[[0], []],
                min_tokens=[1, 0],
                bad_words=[[], [[0, 0]]],
            ),
        )
        ops.sample_tokens(
            torch.empty(6, dtype=torch.int64, device="cuda"),
            **sample_arguments(
                logits,
                temperatures=[0.0, 1.0, 0.5, 2.0, 1.0, 1.0],
                top_k=[0, 0, 20, 0, 0, 3000],
                top_p=[1.0, 1.0, 1.0, 0.9, 0.5, 0.999],
                min_p=[0.0, 0.5, 0.0, 0.0, 0.0, 0.0],
            ),
            adjusted=adjusted,
            adjusted_rows=torch.tensor([-1, 1, -1, -1, -1, 0], dtype=torch.int32, device="cuda"),
        )


if __name__ == "__main__":
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for offset in (0, 1):  # aligned to 16 bytes, and not
            for cache_dtype in (dtype, FLOAT8):
                run_attention(dtype, cache_dtype, offset)
                run_cache_ops(dtype, cache_dtype, offset)
            run_layer_ops(dtype, offset)
            run_sampling(dtype, offset)
        if dtype != torch.float32:
            run_linear(dtype)
            for cache_dtype in (dtype, torch.float8_e4m3fn):
                run_qkv_linear(dtype, cache_dtype)
    torch.cuda.synchronize()
    print("ran every op")
