"""The oracles: every op of `nano_vllm.ops` in plain torch, with the same parameters.

They compute in float64 and round once, where they write; given a float64 tensor to write into they
do not round at all. They follow the text of `nano_vllm/ops.py`, not the kernels, and prefer the
obvious form to the quick one.
"""

from __future__ import annotations

import torch


def paged_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    min_query_len: int = 0,
    sliding_window: int = 0,
    softcap: float = 0.0,
    workspace: torch.Tensor | None = None,
    is_planned: bool = False,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    shared_prefix: torch.Tensor | None = None,
) -> None:
    """Softmax over the whole score matrix of one sequence after the other."""
    starts = query_start_loc.tolist()
    for s, seq_len in enumerate(seq_lens.tolist()):
        queries = query[starts[s] : starts[s + 1]].double().transpose(0, 1)
        num_heads, query_len, _ = queries.shape
        if query_len == 0:
            continue
        # Tokens that no query sees; blocks of nothing else may be another sequence's.
        unseen = max(seq_len - query_len + 1 - sliding_window, 0) if sliding_window else 0
        keys = _cached_tokens(key_cache, k_scale, block_tables[s], unseen, seq_len, num_heads)
        values = _cached_tokens(value_cache, v_scale, block_tables[s], unseen, seq_len, num_heads)
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        query_positions = torch.arange(seq_len - query_len, seq_len, device=query.device)[:, None]
        key_positions = torch.arange(unseen, seq_len, device=query.device)[None, :]
        visible = key_positions <= query_positions
        if sliding_window:
            visible &= key_positions > query_positions - sliding_window
        weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
        out[starts[s] : starts[s + 1]] = (weights @ values).transpose(0, 1)


def _cached_tokens(
    cache: torch.Tensor,
    scale: torch.Tensor | None,
    block_table: torch.Tensor,
    begin: int,
    end: int,
    num_heads: int,
) -> torch.Tensor:
    """Tokens of one sequence, a head per query head: [num_heads, end - begin, head_dim]."""
    _, block_size, num_kv_heads, _ = cache.shape
    first = begin // block_size
    blocks = block_table[first : -(-end // block_size)].long()
    offset = first * block_size
    tokens = cache[blocks].flatten(0, 1)[begin - offset : end - offset].double()
    if scale is not None:
        tokens = tokens * scale.double()[:, None]
    return tokens.repeat_interleave(num_heads // num_kv_heads, dim=1).transpose(0, 1)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """One token after the other."""
    block_size = key_cache.shape[1]
    keys = key if k_scale is None else key.double() / k_scale.double()[:, None]
    values = value if v_scale is None else value.double() / v_scale.double()[:, None]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            at = slot // block_size, slot % block_size
            key_cache[at] = _representable(keys[token], key_cache.dtype)
            value_cache[at] = _representable(values[token], value_cache.dtype)


def _representable(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is too large for float8 becomes its largest; torch would make it NaN."""
    return x.double().clamp(-448, 448).to(dtype) if dtype == torch.float8_e4m3fn else x


def rotary_reshape_and_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    is_neox: bool = True,
    query_norm_weight: torch.Tensor | None = None,
    key_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Norm, rotation and write, one after the other; norms are rounded, to the dtype of `value`."""
    key = key.clone()
    for heads, weight in ((query, query_norm_weight), (key, key_norm_weight)):
        if weight is not None:
            rms_norm(heads, heads, weight, norm_eps)
            heads.copy_(heads.to(value.dtype))
        _rotate(heads, cos_sin_cache[positions].double()[:, None, :], is_neox)
    reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale
    )


def _rotate(heads: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool) -> None:
    """(x, y) -> (x cos - y sin, y cos + x sin) for each pair of elements."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[..., :half], cos_sin[..., half:]
    if is_neox:
        first, second = heads[..., :half], heads[..., half : 2 * half]
    else:
        first, second = heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    x, y = first.double(), second.double()
    turned = x * cos - y * sin, y * cos + x * sin
    first.copy_(turned[0])
    second.copy_(turned[1])


def copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    """One pair after the other."""
    swap_blocks(kv_cache, kv_cache, block_mapping)


def swap_blocks(
    src_cache: torch.Tensor, dst_cache: torch.Tensor, block_mapping: torch.Tensor
) -> None:
    """One pair after the other."""
    for src, dst in block_mapping.tolist():
        dst_cache[:, :, dst] = src_cache[:, :, src].to(dst_cache.device)


def rms_norm(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """input / sqrt(mean(input^2) + eps) * weight."""
    x = input.double()
    out.copy_(x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double())


def fused_add_rms_norm(
    out: torch.Tensor, input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """The norm is that of the sum as `residual` holds it, rounded to its dtype."""
    residual.copy_(residual.double() + input.double())
    rms_norm(out, residual, weight, eps)


def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    """x / (1 + exp(-x)) of the gate, times up."""
    gate, up = input.double().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def gelu_and_mul(out: torch.Tensor, input: torch.Tensor, approximate: str = "none") -> None:
    """x * Phi(x) of the gate, or its tanh form, times up."""
    gate, up = input.double().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.gelu(gate, approximate=approximate) * up)


def linear(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """input @ weight.T + bias."""
    product = input.double() @ weight.double().T
    out.copy_(product if bias is None else product + bias.double())
