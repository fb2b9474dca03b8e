"""The kernels, one typed function each: the only module that touches the compiled ops.

Every function writes into tensors its caller owns, runs on the device of its tensors and, on CUDA,
on the current stream, without allocating or synchronising. A tensor of a wrong device, dtype,
layout or shape raises ValueError with the value found; values inside device tensors (block
numbers, slots, positions) are the caller's duty. Strides are free except where a dimension is said
to be contiguous. The last dimension always is.
"""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_ops.so")
if not _LIBRARY.exists():
    raise ImportError(f"{_LIBRARY} is missing: build it with `pip install -e .`")
torch.ops.load_library(str(_LIBRARY))
_ops = torch.ops.nano_vllm


def has_cuda() -> bool:
    """Whether the CUDA kernels were built."""
    return bool(_ops.has_cuda())


def paged_attention_workspace_numel(num_seqs: int, num_heads: int, head_dim: int) -> int:
    """Floats of workspace that `paged_attention` may need for `num_seqs` sequences on CUDA."""
    return int(_ops.paged_attention_workspace_numel(num_seqs, num_heads, head_dim))


def plan_attention(
    workspace: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_query_len: int,
    min_query_len: int = 0,
    sliding_window: int = 0,
    shared_prefix: torch.Tensor | None = None,
) -> None:
    """Share out a batch's attention among the GPU's thread blocks, once for all layers alike.

    `paged_attention` finds the plan in the workspace where `is_planned` says so, for the same
    numbers and the same content of `query_start_loc`, `seq_lens` and `shared_prefix`. Does nothing
    on a CPU.

    Args:
        workspace: float32, at least `paged_attention_workspace_numel` long.
        query_start_loc: [num_seqs + 1], int32, ascending from 0.
        seq_lens: [num_seqs], int32.
        num_heads: of the queries.
        num_kv_heads: of keys and values.
        head_dim: elements per head.
        max_query_len: upper bound of the query lengths.
        min_query_len: lower bound of them; from 9 on no kernel for decodes is launched.
        sliding_window: tokens a query sees, itself included; 0 for all.
        shared_prefix: see `paged_attention`.
    """
    _ops.plan_attention(
        workspace,
        query_start_loc,
        seq_lens,
        num_heads,
        num_kv_heads,
        head_dim,
        min_query_len,
        max_query_len,
        sliding_window,
        shared_prefix,
    )


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
    """Causal attention of variable-length queries over a paged KV cache (vLLM, arXiv 2309.06180).

    Sequence `s` owns query rows `query_start_loc[s]:query_start_loc[s + 1]`, the last of which sits
    at position `seq_lens[s] - 1`. A query at position `p` sees positions `max(0, p - sliding_window
    + 1)` to `p`. Cache rows past `seq_lens[s]` never reach the result, whatever they hold; output
    rows past `query_start_loc[-1]` are not written.

    Args:
        out: [num_tokens, num_heads, head_dim], float32, float16 or bfloat16; head_dim 64, 80, 96,
            128, 192 or 256.
        query: [num_tokens, num_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the query's dtype or
            float8_e4m3fn; block_size 8 to 256.
        value_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the same dtype.
        block_tables: [num_seqs, max_blocks_per_seq], int32; the block of each run of block_size
            tokens.
        query_start_loc: [num_seqs + 1], int32, ascending from 0.
        seq_lens: [num_seqs], int32; cached tokens including the queries. 0 with no queries is
            allowed.
        max_query_len: upper bound of the query lengths; 1 for a pure decode.
        max_seq_len: upper bound of `seq_lens`.
        scale: multiplies query . key.
        min_query_len: as for `plan_attention`, and the same.
        sliding_window: tokens a query sees, itself included; 0 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 for off.
        workspace: float32, at least `paged_attention_workspace_numel` long; CUDA only.
        is_planned: whether `plan_attention` has filled the workspace; else that is done here.
        k_scale: [num_kv_heads], float32, positive; multiplies the keys of a float8_e4m3fn cache;
            None for 1.
        v_scale: [num_kv_heads], likewise for the values.
        shared_prefix: [2, num_seqs], int32; which sequences of one query token begin with the same
            blocks. Row 0: a leader, the number of a sequence that leads itself; row 1: how many
            tokens, as many as the leader says and fewer than `seq_lens`, lie in the leader's
            blocks, 0 for none. These are read once for all, on sm_90 without a sliding window;
            elsewhere this is not looked at. The result is the same but for rounding.
    """
    _ops.paged_attention(
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        min_query_len,
        max_query_len,
        max_seq_len,
        scale,
        sliding_window,
        softcap,
        workspace,
        is_planned,
        k_scale,
        v_scale,
        shared_prefix,
    )


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
    """Write new keys and values into their cache slots.

    A float8_e4m3fn cache gets x / scale, rounded to nearest even and at most 448 in magnitude.

    Args:
        key: [num_tokens, num_kv_heads, head_dim].
        value: [num_tokens, num_kv_heads, head_dim].
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the keys' dtype or
            float8_e4m3fn.
        value_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the same dtype.
        slot_mapping: [num_tokens], int64; block * block_size + row, negative for padding.
        k_scale: [num_kv_heads], float32, positive; for a float8_e4m3fn cache; None for 1.
        v_scale: [num_kv_heads], likewise.
    """
    _ops.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)


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
    """Rotate queries and keys by their positions (RoFormer, arXiv 2104.09864), the queries in
    place, the keys on their way into the cache; write the values beside them.

    With norm weights each head is normalised first, as `rms_norm` does it. Queries of padding
    tokens are rotated too; `key` and `value` stay as they are. The cache gets what
    `reshape_and_cache` would write of the rotated keys, rounded to their dtype.

    Args:
        positions: [num_tokens], int64, each in [0, max_position).
        query: [num_tokens, num_heads, head_dim]; head_dim at most 256.
        key: [num_tokens, num_kv_heads, head_dim].
        value: [num_tokens, num_kv_heads, head_dim].
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the keys' dtype or
            float8_e4m3fn.
        value_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the same dtype.
        slot_mapping: [num_tokens], int64; block * block_size + row, negative for padding.
        cos_sin_cache: [max_position, rotary_dim], float32; rotary_dim / 2 cosines, then as many
            sines. Elements of a head past rotary_dim are not rotated.
        is_neox: pair element i with i + rotary_dim / 2; else (gptj) 2i with 2i + 1.
        query_norm_weight: [head_dim].
        key_norm_weight: [head_dim].
        norm_eps: added to the mean of squares.
        k_scale: [num_kv_heads], float32, positive; for a float8_e4m3fn cache; None for 1.
        v_scale: [num_kv_heads], likewise.
    """
    _ops.rotary_reshape_and_cache(
        positions,
        query,
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        cos_sin_cache,
        is_neox,
        query_norm_weight,
        key_norm_weight,
        norm_eps,
        k_scale,
        v_scale,
    )


def qkv_linear(
    query: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    query_norm_weight: torch.Tensor | None = None,
    key_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """`rotary_reshape_and_cache` of the query, key and value that are input @ weight.T + bias, as
    one kernel on CUDA, for any number of rows: nothing between is written, or rounded.

    It needs sm_90, float16 or bfloat16, heads of 64 or 128 elements, which are rotated in pairs i
    and i + head_dim / 2 (neox), and tensors that begin at multiples of 16 bytes, as do their rows
    and heads. A row's bits do not depend on the others.

    Args:
        query: [num_tokens, num_heads, head_dim]; padding tokens have theirs, too.
        input: [num_tokens, in_features], a multiple of 8.
        weight: [(num_heads + 2 * num_kv_heads) * head_dim, in_features]; those of the query's
            heads, the key's and the value's.
        bias: [(num_heads + 2 * num_kv_heads) * head_dim].
        positions: [num_tokens], int64, each in [0, max_position).
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the input's dtype or
            float8_e4m3fn.
        value_cache: [num_blocks, block_size, num_kv_heads, head_dim], of the same dtype.
        slot_mapping: [num_tokens], int64; block * block_size + row, negative for padding.
        cos_sin_cache: [max_position, head_dim], float32; half cosines, then as many sines.
        query_norm_weight: [head_dim].
        key_norm_weight: [head_dim].
        norm_eps: added to the mean of squares.
        k_scale: [num_kv_heads], float32, positive; for a float8_e4m3fn cache; None for 1.
        v_scale: [num_kv_heads], likewise.
    """
    _ops.qkv_linear(
        query,
        input,
        weight,
        bias,
        positions,
        key_cache,
        value_cache,
        slot_mapping,
        cos_sin_cache,
        query_norm_weight,
        key_norm_weight,
        norm_eps,
        k_scale,
        v_scale,
    )


def qkv_linear_pays(weight: torch.Tensor, num_rows: int, head_dim: int) -> bool:
    """Whether `qkv_linear` can take a weight [out_features, in_features], of heads that it can
    rotate, and is faster for so many rows than torch's product with `rotary_reshape_and_cache`
    behind it.
    """
    # On a CPU the call alone would cost a layer some microseconds.
    return weight.is_cuda and bool(_ops.qkv_linear_pays(weight, num_rows, head_dim))


def copy_blocks(kv_cache: torch.Tensor, block_mapping: torch.Tensor) -> None:
    """Copy KV blocks within a pool, all layers in one launch (copy-on-write).

    No block may be both a source and a destination, or a destination twice.

    Args:
        kv_cache: [num_layers, 2, num_blocks, ...]; the dimensions of one block are dense, in any
            order.
        block_mapping: [num_pairs, 2], int64, on the same device; source block, destination block.
    """
    _ops.copy_blocks(kv_cache, block_mapping)


def swap_blocks(
    src_cache: torch.Tensor, dst_cache: torch.Tensor, block_mapping: torch.Tensor
) -> None:
    """Copy KV blocks between two pools, one of which may be in pinned host memory.

    Args:
        src_cache: [num_layers, 2, num_src_blocks, ...].
        dst_cache: [num_layers, 2, num_dst_blocks, ...]; its blocks are laid out like the source's.
        block_mapping: [num_pairs, 2], int64; source block, destination block. On the GPU if either
            pool is.
    """
    _ops.swap_blocks(src_cache, dst_cache, block_mapping)


def rms_norm(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Root-mean-square norm of each row (arXiv 1910.07467): out = input / sqrt(mean(input^2) + eps)
    * weight.

    Args:
        out: [num_rows, hidden_size] or [num_rows, num_heads, hidden_size]; may be `input`.
        input: the same shape.
        weight: [hidden_size].
        eps: added to the mean of squares.
    """
    _ops.rms_norm(out, input, weight, eps)


def fused_add_rms_norm(
    out: torch.Tensor, input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """residual += input, then out = rms_norm(residual).

    Args:
        out: [num_rows, hidden_size]; may be `input`.
        input: [num_rows, hidden_size].
        residual: [num_rows, hidden_size], updated in place.
        weight: [hidden_size].
        eps: added to the mean of squares.
    """
    _ops.fused_add_rms_norm(out, input, residual, weight, eps)


def peer_buffer_bytes(max_bytes: int, num_ranks: int) -> int:
    """Bytes of a rank's buffer for `all_reduce` of messages of so many bytes."""
    return int(_ops.peer_buffer_bytes(max_bytes, num_ranks))


def allocate_peer_buffer(like: torch.Tensor, num_bytes: int) -> int:
    """Memory on the GPU of a tensor that other processes of the host may map, filled with zeros.

    Returns:
        its address, for `release_peer_buffer`.
    """
    return int(_ops.allocate_peer_buffer(like, num_bytes))


def export_peer_buffer(like: torch.Tensor, handle: torch.Tensor, buffer: int) -> None:
    """Write what another process needs to map a buffer; ValueError where it cannot be mapped.

    Args:
        like: a tensor on the buffer's GPU.
        handle: [64], uint8, on the CPU.
        buffer: from `allocate_peer_buffer`.
    """
    _ops.export_peer_buffer(like, handle, buffer)


def import_peer_buffer(like: torch.Tensor, handle: torch.Tensor) -> int:
    """Map another process's buffer for the GPU of a tensor; ValueError where there is no way.

    Returns:
        its address here.
    """
    return int(_ops.import_peer_buffer(like, handle))


def release_peer_buffer(like: torch.Tensor, buffer: int, is_own: bool) -> None:
    """Free a buffer of one's own, or map another's no longer."""
    _ops.release_peer_buffer(like, buffer, is_own)


def all_reduce(
    out: torch.Tensor,
    input: torch.Tensor,
    buffers: torch.Tensor,
    rank: int,
    max_bytes: int,
    way: str,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """out = the sum of all ranks' input; with a residual, residual += that, and out =
    rms_norm(residual). On CUDA alone.

    All ranks make the same calls in the same order, on GPUs of as many multiprocessors, and get the
    same bits, in every way: sums are float32, in the order of the ranks.

    Args:
        out: [num_rows, hidden_size]; may be `input`.
        input: [num_rows, hidden_size]; rows are contiguous, one behind the other, and multiples of
            16 bytes, as they are in all the others.
        buffers: [num_ranks], int64, on the CPU; the address of each rank's buffer of
            `peer_buffer_bytes(max_bytes, num_ranks)`, zeros before the first call.
        rank: which of them is on this GPU.
        max_bytes: of the largest message, a multiple of 16.
        way: "one-shot": each rank sends all of its rows to all others. "two-shot": each sums a
            share and sends the sums to the others. "plain": as one-shot, without a flag beside
            every 4 bytes, once a block has sent all of its rows. One-shot and plain messages have
            at most about 2 / num_ranks of `max_bytes`.
        residual: [num_rows, hidden_size], updated in place.
        weight: [hidden_size], with a residual.
        eps: added to the mean of squares.
    """
    _ops.all_reduce(out, input, residual, weight, eps, buffers, rank, max_bytes, way)


def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    """out = silu(gate) * up (SwiGLU, arXiv 2002.05202).

    Args:
        out: [num_tokens, intermediate_size].
        input: [num_tokens, 2 * intermediate_size]; gate, then up.
    """
    _ops.silu_and_mul(out, input)


def gelu_and_mul(out: torch.Tensor, input: torch.Tensor, approximate: str = "none") -> None:
    """out = gelu(gate) * up (GeGLU, arXiv 2002.05202).

    Args:
        out: [num_tokens, intermediate_size].
        input: [num_tokens, 2 * intermediate_size]; gate, then up.
        approximate: "none" for erf, "tanh" for the tanh form.
    """
    _ops.gelu_and_mul(out, input, approximate)


def linear(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """out = input @ weight.T + bias for few rows; a row's bits do not depend on the other rows.

    On CUDA it takes what `linear_max_rows` says, and rows that begin at multiples of 16 bytes. The
    weight is read ahead of the kernel before: nothing that is still running may write it.

    Args:
        out: [num_rows, out_features].
        input: [num_rows, in_features].
        weight: [out_features, in_features].
        bias: [out_features].
    """
    _ops.linear(out, input, weight, bias)


def linear_silu_and_mul(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor) -> None:
    """out = silu(input @ gate.T) * (input @ up.T) on CUDA, under the conditions of `linear` but for
    any number of rows; of more than 32 the intermediate size is a multiple of 32.

    A row's bits do not depend on the others, but differ between up to 32 rows and more.

    Args:
        out: [num_rows, intermediate_size].
        input: [num_rows, in_features].
        weight: [2 * intermediate_size, in_features]; gate, then up.
    """
    _ops.linear_silu_and_mul(out, input, weight)


def linear_silu_and_mul_pays(weight: torch.Tensor, num_rows: int) -> bool:
    """Whether `linear_silu_and_mul` can take a weight [2 * intermediate_size, in_features] and is
    faster for so many rows than torch's product with the activation behind it.
    """
    return bool(_ops.linear_silu_and_mul_pays(weight, num_rows))


def linear_max_rows(weight: torch.Tensor) -> int:
    """Rows up to which `linear` is the product to take for a weight [out_features, in_features]; 0
    where there is none. On CUDA: on sm_90, in float16 and bfloat16, with features in multiples of
    8.
    """
    return int(_ops.linear_max_rows(weight))


def quantized_linear(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """out = input @ weight.T + bias on a CPU, with weights of 4 or 8 bits and the input rounded to
    8 bits in groups of 32; a row's bits do not depend on the other rows.

    Args:
        out: [num_rows, out_features].
        input: [num_rows, in_features]; in_features a multiple of 32.
        weight: [ceil(out_features / 16), in_features / 32, 320 or 576], uint8, as
            `quantization.packed_weight.pack` gives it.
        bias: [out_features].
    """
    _ops.quantized_linear(out, input, weight, bias)


def adjust_logits(
    out: torch.Tensor,
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    new_token_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    prompt_lens: torch.Tensor,
    repetition_penalties: torch.Tensor,
    frequency_penalties: torch.Tensor,
    presence_penalties: torch.Tensor,
    bias_starts: torch.Tensor,
    bias_token_ids: torch.Tensor,
    bias_values: torch.Tensor,
    allowed_starts: torch.Tensor,
    allowed_token_ids: torch.Tensor,
    end_starts: torch.Tensor,
    end_token_ids: torch.Tensor,
    min_tokens: torch.Tensor,
    bad_word_starts: torch.Tensor,
    bad_word_token_starts: torch.Tensor,
    bad_word_token_ids: torch.Tensor,
) -> None:
    """Logits of some rows as their requests want them: with penalties and a bias, and -inf for what
    must not come next.

    In this order: the repetition penalty (arXiv 1909.05858) divides a positive logit and multiplies
    a negative one of each token that the sequence holds; of each token of the output the frequency
    penalty is subtracted as often as it occurs, then the presence penalty once; the bias is added;
    -inf are all tokens but the allowed ones, the ends of an output shorter than min_tokens, and the
    last token of a bad word whose others the output ends with.

    Lists of tokens lie one after the other: list i is token_ids[starts[i] : starts[i + 1]]. They
    are int32, as is all but the logits, the penalties, bias_values (float32) and new_token_ids
    (int64).

    Args:
        out: [num_rows, vocab_size], float32; NaN for a row whose largest logit is not finite.
        logits: [num_logits_rows, vocab_size].
        rows: [num_rows]; where each is in logits, new_token_ids and seq_lens.
        token_ids: [num_slots, max_len]; what each sequence holds. Its last token is written here
            first.
        slots: [num_rows]; where in token_ids; -1 for rows without penalties and bad words.
        new_token_ids: [num_logits_rows]; the last token of each sequence.
        seq_lens: [num_logits_rows]; tokens of each sequence, the last one counted.
        prompt_lens: [num_rows].
        repetition_penalties: [num_rows]; 1 for none.
        frequency_penalties: [num_rows]; 0 for none, as with the next.
        presence_penalties: [num_rows].
        bias_starts: [num_rows + 1], with bias_token_ids and, beside these, bias_values; a token at
            most once in a row.
        allowed_starts: [num_rows + 1], with allowed_token_ids; an empty list allows all.
        end_starts: [num_rows + 1], with end_token_ids.
        min_tokens: [num_rows].
        bad_word_starts: [num_rows + 1]; which bad words are the row's.
        bad_word_token_starts: [num_bad_words + 1], with bad_word_token_ids.
    """
    _ops.adjust_logits(
        out,
        logits,
        rows,
        token_ids,
        slots,
        new_token_ids,
        seq_lens,
        prompt_lens,
        repetition_penalties,
        frequency_penalties,
        presence_penalties,
        bias_starts,
        bias_token_ids,
        bias_values,
        allowed_starts,
        allowed_token_ids,
        end_starts,
        end_token_ids,
        min_tokens,
        bad_word_starts,
        bad_word_token_starts,
        bad_word_token_ids,
    )


def sample_tokens(
    out: torch.Tensor,
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    streams: torch.Tensor,
    seq_lens: torch.Tensor,
    prompt_lens: torch.Tensor,
    adjusted: torch.Tensor | None = None,
    adjusted_rows: torch.Tensor | None = None,
) -> None:
    """Draw a token from each row of logits.

    A token's weight is exp((logit - largest) / temperature), to 43 bits behind the point. Top-k
    keeps the tokens from the k-th largest logit upward; top-p of these as many of the likeliest as
    reach top_p times the sum of their weights; min-p those whose weight is at least that fraction
    of the largest. Tokens of equal logits stay or go together. The token is the first whose weight,
    with those before it, is more than number * (sum of the weights kept). Weights are added as
    integers: a row's token does not depend on the other rows.

    The number, in [0, 1), is a function of the row's seed, stream and position = seq_len -
    prompt_len alone: 53 bits of Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed, with the
    position and the stream as the counter's halves.

    Args:
        out: [num_rows], int64; -1 for a row whose largest logit is NaN or infinite, -2 for one that
            is -inf throughout.
        logits: [num_rows, vocab_size], vocab_size in [1, 2^20].
        temperatures: [num_rows], float64, at least 0; 0 takes the likeliest token, the first of
            equal ones.
        top_k: [num_rows], int32; 0 keeps all.
        top_p: [num_rows], float64, above 0; 1 keeps all.
        min_p: [num_rows], float64: temperature * log(min_p), at most 0; -inf keeps all.
        seeds: [num_rows], int64, as is streams.
        seq_lens: [num_rows], int32, as is prompt_lens.
        adjusted: [num_adjusted, vocab_size], float32; drawn from in place of `logits`, by rows with
            a number of at least 0 in `adjusted_rows`.
        adjusted_rows: [num_rows], int32.
    """
    _ops.sample_tokens(
        out,
        logits,
        temperatures,
        top_k,
        top_p,
        min_p,
        seeds,
        streams,
        seq_lens,
        prompt_lens,
        adjusted,
        adjusted_rows,
    )
