"""A wrong tensor is a ValueError that quotes it, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits
from tests.kernels.draw import FLOAT8
from tests.kernels.sampling import adjust_arguments, sample_arguments

Arguments = dict[str, Any]


def paged_attention_arguments() -> Arguments:
    """Two sequences of 3 blocks of 8 tokens, 6 query heads on 2."""
    return {
        "out": torch.zeros(7, 6, 64),
        "query": torch.zeros(7, 6, 64),
        "key_cache": torch.zeros(9, 8, 2, 64),
        "value_cache": torch.zeros(9, 8, 2, 64),
        "block_tables": torch.zeros(2, 3, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 3, 7], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 20], dtype=torch.int32),
        "max_query_len": 4,
        "min_query_len": 3,
        "max_seq_len": 20,
        "scale": 0.125,
        "sliding_window": 0,
        "softcap": 0.0,
        "workspace": torch.zeros(ops.paged_attention_workspace_numel(2, 6, 64)),
        "k_scale": None,
        "v_scale": None,
    }


def plan_attention_arguments() -> Arguments:
    return {
        "workspace": torch.zeros(ops.paged_attention_workspace_numel(2, 6, 64)),
        "query_start_loc": torch.tensor([0, 3, 7], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 20], dtype=torch.int32),
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_query_len": 4,
        "min_query_len": 3,
        "sliding_window": 0,
    }


def reshape_and_cache_arguments() -> Arguments:
    return {
        "key": torch.zeros(7, 2, 64),
        "value": torch.zeros(7, 2, 64),
        "key_cache": torch.zeros(9, 8, 2, 64),
        "value_cache": torch.zeros(9, 8, 2, 64),
        "slot_mapping": torch.arange(7),
        "k_scale": None,
        "v_scale": None,
    }


def rotary_reshape_and_cache_arguments() -> Arguments:
    return reshape_and_cache_arguments() | {
        "positions": torch.arange(7),
        "query": torch.zeros(7, 6, 64),
        "cos_sin_cache": torch.zeros(20, 64),
        "query_norm_weight": torch.zeros(64),
        "key_norm_weight": torch.zeros(64),
        "norm_eps": 1e-6,
    }


def copy_blocks_arguments() -> Arguments:
    return {
        "kv_cache": torch.zeros(3, 2, 9, 8, 2, 64),
        "block_mapping": torch.tensor([[0, 1]]),
    }


def swap_blocks_arguments() -> Arguments:
    return {
        "src_cache": torch.zeros(3, 2, 9, 8, 2, 64),
        "dst_cache": torch.zeros(3, 2, 5, 8, 2, 64),
        "block_mapping": torch.tensor([[0, 1]]),
    }


def rms_norm_arguments() -> Arguments:
    return {
        "out": torch.zeros(7, 64),
        "input": torch.zeros(7, 64),
        "weight": torch.zeros(64),
        "eps": 1e-6,
    }


def fused_add_rms_norm_arguments() -> Arguments:
    return rms_norm_arguments() | {"residual": torch.zeros(7, 64)}


def silu_and_mul_arguments() -> Arguments:
    return {"out": torch.zeros(7, 64), "input": torch.zeros(7, 128)}


def gelu_and_mul_arguments() -> Arguments:
    return silu_and_mul_arguments() | {"approximate": "none"}


def linear_arguments() -> Arguments:
    return {
        "out": torch.zeros(7, 32),
        "input": torch.zeros(7, 64),
        "weight": torch.zeros(32, 64),
        "bias": torch.zeros(32),
    }


def adjust_logits_arguments() -> Arguments:
    said = [[1, 2], [3], [4, 5, 6]]
    lists = {"bias": [{1: 2.0}, {}, {}], "bad_words": [[], [[1, 2]], [[3]]]}
    arguments = adjust_arguments(torch.zeros(7, 64), said, [1, 1, 2], **lists)  # type: ignore[arg-type]
    return {"out": torch.zeros(3, 64), **arguments}


def sample_tokens_arguments() -> Arguments:
    return {
        "out": torch.zeros(7, dtype=torch.int64),
        **sample_arguments(torch.zeros(7, 64)),
        "adjusted": torch.zeros(2, 64),
        "adjusted_rows": torch.tensor([-1, 0, 1, -1, -1, -1, -1], dtype=torch.int32),
    }


VALID: dict[str, Callable[[], Arguments]] = {
    "paged_attention": paged_attention_arguments,
    "plan_attention": plan_attention_arguments,
    "reshape_and_cache": reshape_and_cache_arguments,
    "rotary_reshape_and_cache": rotary_reshape_and_cache_arguments,
    "copy_blocks": copy_blocks_arguments,
    "swap_blocks": swap_blocks_arguments,
    "rms_norm": rms_norm_arguments,
    "fused_add_rms_norm": fused_add_rms_norm_arguments,
    "silu_and_mul": silu_and_mul_arguments,
    "gelu_and_mul": gelu_and_mul_arguments,
    "linear": linear_arguments,
    "adjust_logits": adjust_logits_arguments,
    "sample_tokens": sample_tokens_arguments,
}


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, not contiguous in its last dimension."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Any], torch.Tensor]:
    return lambda _: torch.zeros(shape, dtype=dtype)


GAPPED = "must be contiguous in its last dimension, got stride 2"
FLOATS = "must be float32, float16 or bfloat16"

# op -> (argument, its value made from the valid one, the error)
BAD: dict[str, list[tuple[str, Callable[[Any], Any], str]]] = {
    "paged_attention": [
        ("query", torch.Tensor.double, f"query {FLOATS}, got float64"),
        ("query", torch.Tensor.half, "out must be float16, got float32"),
        ("query", zeros(7, 384), "query must have shape [any, any, any], got [7, 384]"),
        ("query", gapped, f"query {GAPPED}"),
        ("query", zeros(7, 5, 64), "out must have shape [7, 5, 64], got [7, 6, 64]"),
        ("out", torch.Tensor.bfloat16, "out must be float32, got bfloat16"),
        ("out", zeros(6, 6, 64), "out must have shape [7, 6, 64], got [6, 6, 64]"),
        ("out", gapped, f"out {GAPPED}"),
        ("key_cache", torch.Tensor.half,
         "key_cache must be float32 or float8_e4m3fn, got float16"),
        ("key_cache", zeros(9, 8, 2, 64, dtype=FLOAT8),
         "value_cache must be float8_e4m3fn, got float32"),
        ("k_scale", zeros(2), "k_scale is for caches of float8_e4m3fn, got one of float32"),
        ("v_scale", zeros(2), "v_scale is for caches of float8_e4m3fn, got one of float32"),
        ("key_cache", zeros(9, 8, 2, 80),
         "key_cache must have shape [any, any, any, 64], got [9, 8, 2, 80]"),
        ("key_cache", zeros(9, 8, 128),
         "key_cache must have shape [any, any, any, 64], got [9, 8, 128]"),
        ("key_cache", gapped, f"key_cache {GAPPED}"),
        ("value_cache", zeros(8, 8, 2, 64),
         "value_cache must have shape [9, 8, 2, 64], got [8, 8, 2, 64]"),
        ("value_cache", torch.Tensor.bfloat16, "value_cache must be float32, got bfloat16"),
        ("block_tables", torch.Tensor.long, "block_tables must be int32, got int64"),
        ("block_tables", zeros(3, 3, dtype=torch.int32),
         "block_tables must have shape [2, any], got [3, 3]"),
        ("block_tables", gapped, f"block_tables {GAPPED}"),
        ("query_start_loc", torch.Tensor.long, "query_start_loc must be int32, got int64"),
        ("query_start_loc", zeros(2, dtype=torch.int32),
         "query_start_loc must have shape [3], got [2]"),
        ("seq_lens", torch.Tensor.long, "seq_lens must be int32, got int64"),
        ("seq_lens", zeros(2, 1, dtype=torch.int32), "seq_lens must have shape [any], got [2, 1]"),
        ("seq_lens", gapped, f"seq_lens {GAPPED}"),
        ("max_query_len", lambda _: -1, "max_query_len must be in [0, 2^31), got -1"),
        ("min_query_len", lambda _: -1, "min_query_len must be in [0, 2^31), got -1"),
        ("max_seq_len", lambda _: 25, "max_seq_len must be at most 24 (3 blocks of 8), got 25"),
        ("max_seq_len", lambda _: 2**31, "max_seq_len must be in [0, 2^31), got 2147483648"),
        ("sliding_window", lambda _: -1, "sliding_window must be in [0, 2^31), got -1"),
        ("scale", lambda _: float("nan"), "scale must be finite, got nan"),
        ("softcap", lambda _: -1.0, "softcap must be finite and at least 0, got -1"),
        ("softcap", lambda _: float("inf"), "softcap must be finite and at least 0, got inf"),
        ("workspace", torch.Tensor.half, "workspace must be float32, got float16"),
        ("workspace", zeros(2, 8), "workspace must have shape [any], got [2, 8]"),
    ],
    "plan_attention": [
        ("workspace", torch.Tensor.half, "workspace must be float32, got float16"),
        ("workspace", gapped, f"workspace {GAPPED}"),
        ("query_start_loc", torch.Tensor.long, "query_start_loc must be int32, got int64"),
        ("query_start_loc", zeros(2, dtype=torch.int32),
         "query_start_loc must have shape [3], got [2]"),
        ("seq_lens", torch.Tensor.long, "seq_lens must be int32, got int64"),
        ("seq_lens", gapped, f"seq_lens {GAPPED}"),
        ("num_kv_heads", lambda _: 4, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ("num_kv_heads", lambda _: 0, "num_heads must be a multiple of num_kv_heads, got 6 and 0"),
        ("head_dim", lambda _: 72, "head_dim must be 64, 80, 96, 128, 192 or 256, got 72"),
        ("max_query_len", lambda _: -1, "max_query_len must be in [0, 2^31), got -1"),
        ("min_query_len", lambda _: -1, "min_query_len must be in [0, 2^31), got -1"),
        ("sliding_window", lambda _: 2**31, "sliding_window must be in [0, 2^31), got 2147483648"),
    ],
    "reshape_and_cache": [
        ("key", torch.Tensor.int, f"key {FLOATS}, got int32"),
        ("key", zeros(7, 128), "key must have shape [any, any, any], got [7, 128]"),
        ("key", gapped, f"key {GAPPED}"),
        ("value", zeros(5, 2, 64), "value must have shape [7, 2, 64], got [5, 2, 64]"),
        ("value", torch.Tensor.half, "value must be float32, got float16"),
        ("value", gapped, f"value {GAPPED}"),
        ("key_cache", zeros(9, 8, 3, 64),
         "key_cache must have shape [any, any, 2, 64], got [9, 8, 3, 64]"),
        ("key_cache", torch.Tensor.half,
         "key_cache must be float32 or float8_e4m3fn, got float16"),
        ("key_cache", zeros(9, 8, 2, 64, dtype=FLOAT8),
         "value_cache must be float8_e4m3fn, got float32"),
        ("k_scale", zeros(2), "k_scale is for caches of float8_e4m3fn, got one of float32"),
        ("key_cache", gapped, f"key_cache {GAPPED}"),
        ("value_cache", zeros(9, 16, 2, 64),
         "value_cache must have shape [9, 8, 2, 64], got [9, 16, 2, 64]"),
        ("slot_mapping", lambda slots: slots[:5], "slot_mapping must have shape [7], got [5]"),
        ("slot_mapping", torch.Tensor.int, "slot_mapping must be int64, got int32"),
        ("slot_mapping", gapped, f"slot_mapping {GAPPED}"),
    ],
    "rotary_reshape_and_cache": [
        ("query", torch.Tensor.double, f"query {FLOATS}, got float64"),
        ("query", torch.Tensor.half, "key must be float16, got float32"),
        ("query", zeros(7, 384), "query must have shape [any, any, any], got [7, 384]"),
        ("query", gapped, f"query {GAPPED}"),
        ("key", zeros(7, 2, 32), "key must have shape [7, any, 64], got [7, 2, 32]"),
        ("key", zeros(7, 0, 64), "value must have shape [7, 0, 64], got [7, 2, 64]"),
        ("key", gapped, f"key {GAPPED}"),
        ("value", torch.Tensor.half, "value must be float32, got float16"),
        ("key_cache", zeros(9, 8, 3, 64),
         "key_cache must have shape [any, any, 2, 64], got [9, 8, 3, 64]"),
        ("value_cache", gapped, f"value_cache {GAPPED}"),
        ("slot_mapping", lambda slots: slots[:5], "slot_mapping must have shape [7], got [5]"),
        ("v_scale", zeros(2), "v_scale is for caches of float8_e4m3fn, got one of float32"),
        ("positions", torch.Tensor.int, "positions must be int64, got int32"),
        ("positions", lambda positions: positions[:5], "positions must have shape [7], got [5]"),
        ("cos_sin_cache", torch.Tensor.half, "cos_sin_cache must be float32, got float16"),
        ("cos_sin_cache", zeros(20, 63), "rotary_dim must be even and at most head_dim 64, got 63"),
        ("cos_sin_cache", zeros(20, 66), "rotary_dim must be even and at most head_dim 64, got 66"),
        ("cos_sin_cache", lambda cache: cache[:, :32], "cos_sin_cache must be contiguous"),
        ("query_norm_weight", zeros(63), "query_norm_weight must have shape [64], got [63]"),
        ("query_norm_weight", gapped, f"query_norm_weight {GAPPED}"),
        ("key_norm_weight", torch.Tensor.half, "key_norm_weight must be float32, got float16"),
        ("norm_eps", lambda _: -1e-6, "norm_eps must be at least 0, got -1e-06"),
        ("norm_eps", lambda _: float("nan"), "norm_eps must be at least 0, got nan"),
    ],
    "copy_blocks": [
        ("kv_cache", torch.Tensor.double,
         "kv_cache must be float32, float16, bfloat16 or float8_e4m3fn, got float64"),
        ("kv_cache", zeros(3, 9, 8, 2, 64),
         "kv_cache must have shape [num_layers, 2, num_blocks, ...], got [3, 9, 8, 2, 64]"),
        ("kv_cache", gapped, "kv_cache must have dense blocks, got stride 2 where 1 is expected"),
        ("kv_cache", lambda cache: cache[..., :1, :],
         "kv_cache must have dense blocks, got stride 128 where 64 is expected"),
        ("kv_cache", lambda cache: cache.transpose(0, 1)[:2],
         "kv_cache must have shape [num_layers, 2, num_blocks, ...], got [2, 3, 9, 8, 2, 64]"),
        ("kv_cache", lambda cache: torch.zeros(2, 3, 9, 8, 2, 64).transpose(0, 1),
         "kv_cache must have evenly spaced planes, got strides"),
        ("kv_cache", zeros(3, 2, 9, 3),
         "kv_cache must have blocks of a multiple of 16 bytes, got 12"),
        ("block_mapping", torch.Tensor.int, "block_mapping must be int64, got int32"),
        ("block_mapping", zeros(2, 3, dtype=torch.int64),
         "block_mapping must have shape [any, 2], got [2, 3]"),
        ("block_mapping", gapped, "block_mapping must be contiguous"),
    ],
    "swap_blocks": [
        ("src_cache", torch.Tensor.half, "dst_cache must be float16, got float32"),
        ("src_cache", zeros(2, 2, 9, 8, 2, 64),
         "dst_cache must have layers and blocks like src_cache [2, 2, 9, 8, 2, 64], got "
         "[3, 2, 5, 8, 2, 64]"),
        ("dst_cache", zeros(3, 2, 5, 8, 1, 64),
         "dst_cache must have layers and blocks like src_cache [3, 2, 9, 8, 2, 64], got "
         "[3, 2, 5, 8, 1, 64]"),
        ("dst_cache", zeros(3, 2, 5, 2, 8, 64),
         "dst_cache must have blocks laid out like those of src_cache [3, 2, 9, 8, 2, "
         "64], got [3, 2, 5, 2, 8, 64]"),
        ("dst_cache", lambda _: torch.zeros(3, 2, 5, 2, 8, 64).transpose(3, 4),
         "dst_cache must have blocks laid out like those of src_cache [3, 2, 9, 8, 2, 64]"),
        ("block_mapping", torch.Tensor.int, "block_mapping must be int64, got int32"),
    ],
    "rms_norm": [
        ("input", torch.Tensor.double, f"input {FLOATS}, got float64"),
        ("input", zeros(64),
         "input must have shape [num_rows, hidden_size] or [num_rows, num_heads, "
         "hidden_size], got [64]"),
        ("input", gapped, f"input {GAPPED}"),
        ("out", zeros(7, 32), "out must have shape [7, 64], got [7, 32]"),
        ("out", torch.Tensor.half, "out must be float32, got float16"),
        ("out", gapped, f"out {GAPPED}"),
        ("weight", zeros(63), "weight must have shape [64], got [63]"),
        ("weight", torch.Tensor.half, "weight must be float32, got float16"),
        ("weight", gapped, f"weight {GAPPED}"),
        ("eps", lambda _: -1e-6, "eps must be at least 0, got -1e-06"),
        ("eps", lambda _: float("nan"), "eps must be at least 0, got nan"),
    ],
    "fused_add_rms_norm": [
        ("residual", zeros(6, 64), "residual must have shape [7, 64], got [6, 64]"),
        ("residual", torch.Tensor.half, "residual must be float32, got float16"),
        ("residual", gapped, f"residual {GAPPED}"),
    ],
    "silu_and_mul": [
        ("input", torch.Tensor.double, f"input {FLOATS}, got float64"),
        ("input", zeros(7, 127), "input must hold gate and up side by side, got 127 columns"),
        ("input", zeros(7, 2, 64), "input must have shape [any, any], got [7, 2, 64]"),
        ("input", gapped, f"input {GAPPED}"),
        ("out", zeros(7, 128), "out must have shape [7, 64], got [7, 128]"),
        ("out", torch.Tensor.half, "out must be float32, got float16"),
    ],
    "gelu_and_mul": [
        ("out", gapped, f"out {GAPPED}"),
        ("approximate", lambda _: "fast", "approximate must be none or tanh, got fast"),
    ],
    "linear": [
        ("input", torch.Tensor.double, f"input {FLOATS}, got float64"),
        ("input", zeros(7, 63), "weight must have shape [any, 63], got [32, 64]"),
        ("input", zeros(1, 7, 64), "input must have shape [any, any], got [1, 7, 64]"),
        ("weight", torch.Tensor.half, "weight must be float32, got float16"),
        ("weight", gapped, f"weight {GAPPED}"),
        ("out", zeros(7, 31), "out must have shape [7, 32], got [7, 31]"),
        ("bias", zeros(31), "bias must have shape [32], got [31]"),
        ("bias", torch.Tensor.half, "bias must be float32, got float16"),
    ],
    "sample_tokens": [
        ("logits", torch.Tensor.double, f"logits {FLOATS}, got float64"),
        ("logits", zeros(64), "logits must have shape [any, any], got [64]"),
        ("logits", gapped, f"logits {GAPPED}"),
        ("logits", zeros(7, 0), "vocab_size must be in [1, 1048576], got 0"),
        ("out", zeros(6, dtype=torch.int64), "out must have shape [7], got [6]"),
        ("out", torch.Tensor.int, "out must be int64, got int32"),
        ("temperatures", torch.Tensor.float, "temperatures must be float64, got float32"),
        ("top_k", torch.Tensor.long, "top_k must be int32, got int64"),
        ("top_p", zeros(8, dtype=torch.float64), "top_p must have shape [7], got [8]"),
        ("min_p", gapped, f"min_p {GAPPED}"),
        ("seeds", torch.Tensor.int, "seeds must be int64, got int32"),
        ("streams", zeros(7, 1, dtype=torch.int64), "streams must have shape [7], got [7, 1]"),
        ("seq_lens", zeros(6, dtype=torch.int32), "seq_lens must have shape [7], got [6]"),
        ("prompt_lens", torch.Tensor.long, "prompt_lens must be int32, got int64"),
        ("adjusted", torch.Tensor.half, "adjusted must be float32, got float16"),
        ("adjusted", zeros(2, 63), "adjusted must have shape [any, 64], got [2, 63]"),
        ("adjusted", lambda _: None, "adjusted and adjusted_rows come together, got one of them"),
        ("adjusted_rows", zeros(6, dtype=torch.int32),
         "adjusted_rows must have shape [7], got [6]"),
    ],
    "adjust_logits": [
        ("logits", torch.Tensor.double, f"logits {FLOATS}, got float64"),
        ("logits", gapped, f"logits {GAPPED}"),
        ("logits", zeros(7, 0), "vocab_size must be in [1, 1048576], got 0"),
        ("out", torch.Tensor.half, "out must be float32, got float16"),
        ("out", zeros(7, 64), "out must have shape [3, 64], got [7, 64]"),
        ("rows", torch.Tensor.long, "rows must be int32, got int64"),
        ("token_ids", torch.Tensor.long, "token_ids must be int32, got int64"),
        ("token_ids", zeros(3, dtype=torch.int32),
         "token_ids must have shape [any, any], got [3]"),
        ("slots", zeros(4, dtype=torch.int32), "slots must have shape [3], got [4]"),
        ("new_token_ids", torch.Tensor.int, "new_token_ids must be int64, got int32"),
        ("seq_lens", zeros(3, dtype=torch.int32), "seq_lens must have shape [7], got [3]"),
        ("repetition_penalties", torch.Tensor.double,
         "repetition_penalties must be float32, got float64"),
        ("bias_starts", zeros(3, dtype=torch.int32), "bias_starts must have shape [4], got [3]"),
        ("bias_values", zeros(2), "bias_values must have shape [1], got [2]"),
        ("end_token_ids", torch.Tensor.long, "end_token_ids must be int32, got int64"),
        ("bad_word_starts", zeros(3, dtype=torch.int32),
         "bad_word_starts must have shape [4], got [3]"),
        ("bad_word_token_starts", zeros(0, dtype=torch.int32),
         "bad_word_token_starts must have at least one element, got [0]"),
    ],
}  # fmt: skip


def call(op: str, arguments: Arguments) -> None:
    getattr(ops, op)(**arguments)


def to(device: str, arguments: Arguments) -> Arguments:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def assert_refused(op: str, arguments: Arguments, message: str) -> None:
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(op, arguments)
    for tensor, expected in zip(tensors, before, strict=True):
        if tensor.device.type != "meta":
            assert_equal_bits(tensor, expected)


@pytest.mark.parametrize("op", VALID)
def test_valid(device: str, op: str) -> None:
    """What the bad arguments below differ from in one point each."""
    if op == "linear" and device == "cuda":
        pytest.skip("linear runs on the CPU alone")
    call(op, to(device, VALID[op]()))


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [(op, *one) for op, several in BAD.items() for one in several],
)
def test_bad(device: str, op: str, name: str, change: Callable[[Any], Any], message: str) -> None:
    if op == "linear" and device == "cuda":
        pytest.skip("linear runs on the CPU alone")
    arguments = to(device, VALID[op]())
    arguments[name] = change(arguments[name])
    assert_refused(op, to(device, arguments), message)


@pytest.mark.parametrize("head_dim", [0, 32, 72, 512])
def test_head_dim(device: str, head_dim: int) -> None:
    arguments = paged_attention_arguments()
    for name in ("out", "query", "key_cache", "value_cache"):
        arguments[name] = arguments[name].new_zeros(*arguments[name].shape[:-1], head_dim)
    message = f"head_dim must be 64, 80, 96, 128, 192 or 256, got {head_dim}"
    assert_refused("paged_attention", to(device, arguments), message)


@pytest.mark.parametrize(
    ("heads", "head_dim", "message"),
    [
        (2, 257, "head_dim must be at most 256, got 257"),
        (0, 64, "num_kv_heads must be positive, got 0"),
    ],
)
def test_rotary_heads(device: str, heads: int, head_dim: int, message: str) -> None:
    arguments = rotary_reshape_and_cache_arguments()
    arguments["query"] = torch.zeros(7, 6, head_dim)
    for name in ("key", "value", "key_cache", "value_cache"):
        arguments[name] = torch.zeros(*arguments[name].shape[:-2], heads, head_dim)
    for name in ("query_norm_weight", "key_norm_weight"):
        arguments[name] = torch.zeros(head_dim)
    assert_refused("rotary_reshape_and_cache", to(device, arguments), message)


@pytest.mark.parametrize("block_size", [0, 4, 12, 512])
def test_block_size(device: str, block_size: int) -> None:
    arguments = paged_attention_arguments() | {"max_seq_len": 0}
    for name in ("key_cache", "value_cache"):
        arguments[name] = torch.zeros(9, block_size, 2, 64)
    message = f"block_size must be a multiple of 8 in [8, 256], got {block_size}"
    assert_refused("paged_attention", to(device, arguments), message)


CACHE_OPS = ("paged_attention", "reshape_and_cache", "rotary_reshape_and_cache")


@pytest.mark.parametrize("op", CACHE_OPS)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2, dtype=torch.float64), "must be float32, got float64"),
        (torch.ones(3), "must have shape [2], got [3]"),
        (torch.ones(()), "must have shape [2], got []"),
        (torch.ones(2), GAPPED),
        (torch.ones(2, device="meta"), "got an unsupported device"),
    ],
)
def test_scales(device: str, op: str, name: str, scale: torch.Tensor, message: str) -> None:
    arguments = VALID[op]()
    for cache in ("key_cache", "value_cache"):
        arguments[cache] = torch.zeros(9, 8, 2, 64, dtype=FLOAT8)
    arguments = to(device, arguments)
    call(op, arguments)
    where = "meta" if scale.device.type == "meta" else device
    arguments[name] = gapped(scale.to(where)) if message == GAPPED else scale.to(where)
    assert_refused(op, arguments, message)


@pytest.mark.parametrize("num_kv_heads", [0, 4, 12])
def test_head_groups(device: str, num_kv_heads: int) -> None:
    arguments = paged_attention_arguments()
    for name in ("key_cache", "value_cache"):
        arguments[name] = torch.zeros(9, 8, num_kv_heads, 64)
    message = f"num_heads must be a multiple of num_kv_heads, got 6 and {num_kv_heads}"
    assert_refused("paged_attention", to(device, arguments), message)


@pytest.mark.parametrize("op", VALID)
def test_devices_differ(device: str, op: str) -> None:
    """Each tensor in turn is somewhere else: no pointer of another device gets to a kernel."""
    if op == "linear" and device == "cuda":
        pytest.skip("linear runs on the CPU alone")
    names = [name for name, value in VALID[op]().items() if isinstance(value, torch.Tensor)]
    for name in names:
        arguments = to(device, VALID[op]())
        arguments[name] = arguments[name].to("meta")
        assert_refused(op, arguments, "an unsupported device")
        if device == "cuda" and op != "swap_blocks":
            arguments[name] = VALID[op]()[name]
            assert_refused(op, arguments, "must be on")


@pytest.mark.parametrize("op", VALID)
def test_unsupported_device(op: str) -> None:
    with pytest.raises(ValueError, match="an unsupported device"):
        call(op, to("meta", VALID[op]()))


@pytest.mark.cuda
@pytest.mark.parametrize("op", ["paged_attention", "plan_attention"])
def test_workspace_too_small(op: str) -> None:
    arguments = to("cuda", VALID[op]())
    needed = ops.paged_attention_workspace_numel(2, 6, 64)
    arguments["workspace"] = torch.zeros(needed - 1, device="cuda")
    message = f"workspace must hold at least {needed} elements, got {needed - 1}"
    assert_refused(op, arguments, message)
    if op == "paged_attention":
        del arguments["workspace"]
        assert_refused(op, arguments, f"at least {needed} elements, got 0")
