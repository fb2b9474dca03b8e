"""The attention of others, where it is installed, on the same inputs."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from nano_vllm.bench.attention_inputs import AttentionInputs

# Gives the query's elements in its order, however the dimensions are cut.
Call = Callable[[], torch.Tensor]
FLASHINFER_WORKSPACE = 384 * 2**20  # for partial results of split sequences


@dataclass(frozen=True)
class AttentionPeer:
    name: str
    version: str
    is_paged: bool  # reads our blocks where they lie; else its own dense copy
    prepare: Callable[[AttentionInputs], Call | None]  # None where it cannot do the shape

    def __str__(self) -> str:
        return f"{self.name} {self.version} {'paged' if self.is_paged else 'dense'}"


def find_peers(
    known: Sequence[str], chosen: Sequence[str] | None, on_gpu: bool
) -> tuple[AttentionPeer, ...]:
    """The peers that are installed.

    Args:
        known: names of all peers, in the order of the table.
        chosen: names asked for, None for all; ValueError where one of them is not there.
        on_gpu: only torch's own runs on a CPU.
    """
    peers = []
    for name in known:
        if chosen is not None and name not in chosen:
            continue
        peer = _find(name) if on_gpu or name == "torch" else None
        if peer is not None:
            peers.append(peer)
        elif chosen is not None:
            place = "is not installed" if on_gpu else "does not run on a CPU"
            raise ValueError(f"the peer {name} {place}")
    return tuple(peers)


def _find(name: str) -> AttentionPeer | None:
    if name == "torch":
        return AttentionPeer(name, torch.__version__, False, prepare_sdpa)
    for module_name, is_paged, prepare in MODULES[name]:
        module = _import(module_name)
        if module is not None:
            return AttentionPeer(name, _version(module_name), is_paged, partial(prepare, module))
    return None


def _import(name: str) -> ModuleType | None:
    """The module; None where it is not installed, with a line on stderr where it is but broken."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            print(f"{name} cannot be imported: {error}", file=sys.stderr, flush=True)
        return None


def _version(module: str) -> str:
    packages = importlib.metadata.packages_distributions().get(module.split(".")[0])
    return importlib.metadata.version(packages[0]) if packages else "of unknown version"


def prepare_sdpa(inputs: AttentionInputs) -> Call | None:
    """torch's attention on dense tensors; it knows no batch of different lengths."""
    shape = inputs.shape
    if not shape.is_even or shape.num_decodes:
        return None
    is_square = shape.query_len == shape.seq_lens[0]
    options: dict[str, Any] = {"scale": inputs.scale, "enable_gqa": True}
    if shape.query_len > 1 and is_square:
        options["is_causal"] = True
    elif shape.query_len > 1:  # is_causal would align the first query with the first key
        options["attn_mask"] = causal_lower_right(shape.query_len, shape.seq_lens[0])
    query = inputs.batched_query.transpose(1, 2)
    keys, values = inputs.dense_cache
    return lambda: scaled_dot_product_attention(query, keys, values, **options).transpose(1, 2)


def prepare_flashinfer(flashinfer: ModuleType, inputs: AttentionInputs) -> Call:
    """FlashInfer on our blocks, with its plan made here, once, as an engine does for all layers.

    Decodes run on tensor cores, as vLLM and SGLang have it for grouped heads.
    """
    shape, heads, counts = inputs.shape, inputs.heads, inputs.block_counts
    tables = zip(inputs.block_tables, counts, strict=True)
    pages = torch.cat([table[:count] for table, count in tables])
    page_starts = torch.tensor([0, *counts]).cumsum(0).int()
    last_page_lens = torch.tensor(
        [(length - 1) % inputs.block_size + 1 for length in shape.seq_lens], dtype=torch.int32
    )
    sizes = (heads.num_heads, heads.num_kv_heads, heads.head_dim, inputs.block_size)
    options = {
        "sm_scale": inputs.scale,
        "q_data_type": inputs.dtype,
        "kv_data_type": inputs.dtype,
    }
    workspace = _flashinfer_workspace(inputs.device)
    if shape.query_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        wrapper.plan(page_starts, pages, last_page_lens, *sizes, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        starts = inputs.query_start_loc.cpu()
        wrapper.plan(starts, page_starts, pages, last_page_lens, *sizes, causal=True, **options)
    return partial(wrapper.run, inputs.query, (inputs.pool[0], inputs.pool[1]))


@lru_cache(maxsize=1)
def _flashinfer_workspace(device: torch.device) -> torch.Tensor:
    """One for all plans: they run one after the other, and it holds nothing between two calls."""
    return torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)


def prepare_fa3(fa3: ModuleType, inputs: AttentionInputs) -> Call | None:
    """FlashAttention-3 on our blocks; it shares the work out in each call. No mixed batches.

    Its metadata for that can be made beforehand, but a size other than the kernel's own crashes the
    replay of a graph (vllm-project/flash-attention, pull request 162).
    """
    if inputs.shape.num_decodes:
        return None
    return partial(
        fa3.flash_attn_with_kvcache,
        inputs.batched_query,
        inputs.pool[0].transpose(1, 2),
        inputs.pool[1].transpose(1, 2),
        cache_seqlens=inputs.seq_lens,
        page_table=inputs.block_tables,
        softmax_scale=inputs.scale,
        causal=inputs.shape.query_len > 1,
    )


def prepare_vllm_fa3(vllm_flash_attn: ModuleType, inputs: AttentionInputs) -> Call:
    """FlashAttention-3 as vLLM builds it, on our blocks."""
    return partial(
        vllm_flash_attn.flash_attn_varlen_func,
        inputs.query,
        inputs.pool[0].transpose(1, 2),
        inputs.pool[1].transpose(1, 2),
        max_seqlen_q=inputs.shape.query_len,
        cu_seqlens_q=inputs.query_start_loc,
        max_seqlen_k=max(inputs.shape.seq_lens),
        seqused_k=inputs.seq_lens,
        block_table=inputs.block_tables,
        softmax_scale=inputs.scale,
        causal=inputs.shape.query_len > 1,
        fa_version=3,
    )


def prepare_fa3_fwd(fa3: ModuleType, inputs: AttentionInputs) -> Call:
    """FlashAttention-3 without pages: dense where all sequences are of one length, else packed.

    num_splits=0 lets it split long sequences as it sees fit, which is off by default for training.
    """
    options = {
        "softmax_scale": inputs.scale,
        "causal": inputs.shape.query_len > 1,
        "num_splits": 0,
    }
    if inputs.shape.is_even and not inputs.shape.num_decodes:
        keys, values = (cache.transpose(1, 2) for cache in inputs.dense_cache)
        query = inputs.batched_query
        if inputs.shape.query_len == 1:
            return partial(fa3.flash_attn_with_kvcache, query, keys, values, **options)
        return partial(fa3.flash_attn_func, query, keys, values, **options)
    key_starts = torch.zeros_like(inputs.query_start_loc)
    key_starts[1:] = inputs.seq_lens.cumsum(0)
    return partial(
        fa3.flash_attn_varlen_func,
        inputs.query,
        *inputs.packed_cache,
        cu_seqlens_q=inputs.query_start_loc,
        cu_seqlens_k=key_starts,
        max_seqlen_q=inputs.shape.query_len,
        max_seqlen_k=max(inputs.shape.seq_lens),
        **options,
    )


# by peer: the module, whether it is paged, and what prepares a call; the first that is there
MODULES: dict[str, list[tuple[str, bool, Callable[[ModuleType, AttentionInputs], Call | None]]]] = {
    "flashinfer": [("flashinfer", True, prepare_flashinfer)],
    "fa3": [
        ("flash_attn_interface", True, prepare_fa3),
        ("vllm.vllm_flash_attn", True, prepare_vllm_fa3),
    ],
    "fa3-fwd": [("fa3_fwd_interface", False, prepare_fa3_fwd)],
}
