"""Times paged attention in turn with its peers, whose results have to be ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nano_vllm import ops
from nano_vllm.bench.attention_grid import AttentionShape, Heads
from nano_vllm.bench.attention_inputs import AttentionInputs, bytes_needed
from nano_vllm.bench.attention_peers import AttentionPeer
from nano_vllm.bench.kernel_row import Setup
from nano_vllm.bench.timing import alternate, free_bytes, input_sets, repeat_timer

TOLERANCE = 2e-2  # bfloat16 rounds to 4e-3; a token too few or too many is far more


def attention_row(setup: Setup, heads: Heads, shape: AttentionShape) -> dict[str, Any] | None:
    """The row of one shape; None, with a line on stderr, where it does not fit the memory."""
    itemsize = setup.dtype.itemsize
    sets = input_sets(shape.kv_bytes(heads, itemsize), setup.device)
    paged, dense = bytes_needed(shape, heads, itemsize, sets)
    if setup.float8_cache:
        paged += dense // itemsize
    free = free_bytes(setup.device)
    label = f"{shape.kernel} {heads} {shape.name}"
    if paged > free:
        _note(f"{label} is skipped: it needs {_gb(paged)}, {_gb(free)} are free")
        return None
    peers = setup.peers
    if paged + dense > free:
        _note(f"{label} has no dense peers: they need {_gb(dense)} more, {_gb(free)} are free")
        peers = tuple(peer for peer in peers if peer.is_paged)
    inputs = [
        AttentionInputs(shape, heads, setup.block_size, setup.device, setup.dtype)
        for _ in range(sets)
    ]
    seconds, others = _measure(label, inputs, peers, setup.float8_cache)
    return setup.row(
        shape.kernel,
        heads,
        shape.name,
        seconds,
        moved=shape.decode_bytes(heads, itemsize),
        flops=shape.prefill_flops(heads),
        peers=others,
    )


def _measure(
    label: str,
    inputs: list[AttentionInputs],
    peers: tuple[AttentionPeer, ...],
    float8_cache: bool,
) -> tuple[float, dict[str, float | None]]:
    """Seconds of ours and of what is compared, by name."""
    device = inputs[0].device
    ours = _our_calls(inputs)
    reference = ours[0]()
    timers = {"": repeat_timer(ours, device)}
    for peer in peers:
        timer = _peer_timer(label, peer, inputs, reference)
        if timer is not None:
            timers[peer.name] = timer
    if float8_cache:
        timers["fp8 cache"] = repeat_timer(
            _our_calls([one.with_float8_cache() for one in inputs]), device
        )
    seconds = dict(zip(timers, alternate(list(timers.values())), strict=True))
    return seconds.pop(""), dict(seconds)


def _our_calls(inputs: list[AttentionInputs]) -> list[Callable[[], torch.Tensor]]:
    """Calls that share a workspace with the plan in it, as layers do."""
    first = inputs[0]
    heads, workspace = first.heads, None
    if first.device.type == "cuda":
        numel = ops.paged_attention_workspace_numel(
            len(first.shape.seq_lens), heads.num_heads, heads.head_dim
        )
        workspace = torch.empty(numel, dtype=torch.float32, device=first.device)
        ops.plan_attention(
            workspace,
            first.query_start_loc,
            first.seq_lens,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            max_query_len=first.shape.query_len,
        )
    return [
        partial(_paged_attention, one, torch.empty_like(one.query), workspace) for one in inputs
    ]


def _paged_attention(
    inputs: AttentionInputs, out: torch.Tensor, workspace: torch.Tensor | None
) -> torch.Tensor:
    ops.paged_attention(
        out,
        *inputs.arguments(),
        **inputs.options(),
        workspace=workspace,
        is_planned=workspace is not None,
    )
    return out


def _peer_timer(
    label: str, peer: AttentionPeer, inputs: list[AttentionInputs], reference: torch.Tensor
) -> Callable[[], float] | None:
    """What times the peer; None where it cannot do the shape, raises or gives another result.

    All of a peer's code runs here: the timer it leaves has run once, to the end.
    """
    try:
        call = peer.prepare(inputs[0])
        if call is None:
            return None
        error = relative_error(call(), reference)
        if not error <= TOLERANCE:  # so that NaN is refused too
            raise ValueError(f"its result is off by {error:.2g} of ours, allowed is {TOLERANCE}")
        calls = [call, *(_prepared(peer, one) for one in inputs[1:])]
        return repeat_timer(calls, inputs[0].device)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        _note(f"{label} has no {peer.name}: {type(error).__name__}: {reason[0]}")
        return None


def _prepared(peer: AttentionPeer, inputs: AttentionInputs) -> Callable[[], torch.Tensor]:
    call = peer.prepare(inputs)
    assert call is not None, "it could do the same shape a moment ago"
    return call


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error of a row of head_dim elements, by its length: one wrong row shows among any
    number of right ones.

    Args:
        out: as many elements as `reference`, in its order.
        reference: [query_tokens, num_heads, head_dim].
    """
    expected = reference.float()
    errors = (out.reshape(reference.shape).float() - expected).norm(dim=-1)
    return float((errors / expected.norm(dim=-1)).max())


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
