"""Each adapter hands its library the same batch: stand-ins with the libraries' own signatures
answer with torch.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nano_vllm.bench import attention_peers
from nano_vllm.bench.attention_grid import AttentionShape, Heads, decode, prefill
from nano_vllm.bench.attention_inputs import AttentionInputs
from nano_vllm.bench.attention_peers import find_peers, prepare_sdpa
from nano_vllm.bench.attention_rows import relative_error
from nano_vllm.bench.kernels import PEERS
from tests.bench.test_attention_rows import result

HEADS = Heads(6, 2, 64)
UNEVEN = AttentionShape("uneven", (40, 9, 16))
SHAPES = [decode(3, 21), decode(2, 16), prefill(2, 9), prefill(2, 5, prefix=12), UNEVEN]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> Any:
    """One sequence, tokens first: q [query_len, num_heads, head_dim], k and v alike."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    if causal:
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(future, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double()).to(q.dtype)


def pages(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens of a cache [num_blocks, block_size, num_kv_heads, head_dim]."""
    return cache[table[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float = 1.0,
    causal: bool = False,
    num_splits: int = 0,
) -> torch.Tensor:
    outs = []
    for s, query in enumerate(q):
        k, v = k_cache, v_cache
        if page_table is None:
            k, v = k[s], v[s]
        else:
            assert cache_seqlens is not None
            k, v = (pages(x, page_table[s], int(cache_seqlens[s])) for x in (k, v))
        outs.append(attention(query, k, v, softmax_scale, causal))
    return torch.stack(outs)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float = 1.0,
    causal: bool = False,
    num_splits: int = 1,
) -> torch.Tensor:
    return flash_attn_with_kvcache(q, k, v, softmax_scale=softmax_scale, causal=causal)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float = 1.0,
    causal: bool = False,
    num_splits: int = 1,
) -> torch.Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    queries = q.split(cu_seqlens_q.diff().tolist())
    parts = zip(queries, *(x.split(cu_seqlens_k.diff().tolist()) for x in (k, v)), strict=True)
    return torch.cat([attention(*part, softmax_scale, causal) for part in parts])


def vllm_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float = 1.0,
    causal: bool = False,
    block_table: torch.Tensor | None = None,
    fa_version: int = 2,
) -> torch.Tensor:
    assert fa_version == 3
    assert seqused_k is not None
    assert block_table is not None
    assert cu_seqlens_q.diff().max() == max_seqlen_q
    outs = []
    for s, query in enumerate(q.split(cu_seqlens_q.diff().tolist())):
        keys, values = (pages(x, block_table[s], int(seqused_k[s])) for x in (k, v))
        outs.append(attention(query, keys, values, softmax_scale, causal))
    return torch.cat(outs)


class FlashInferWrapper:
    """Plan and run of both wrappers, as far as they are alike."""

    def __init__(
        self, workspace: torch.Tensor, kv_layout: str, use_tensor_cores: bool = False
    ) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"

    def _plan(
        self,
        starts: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        sizes: tuple[int, ...],
        causal: bool,
        sm_scale: float,
    ) -> None:
        assert sizes[:3] == (HEADS.num_heads, HEADS.num_kv_heads, HEADS.head_dim)
        assert indptr.dtype == indices.dtype == last_page_len.dtype == starts.dtype == torch.int32
        self.starts, self.causal, self.scale = starts, causal, sm_scale
        self.tables = indices.split(indptr.diff().tolist())
        self.lengths = ((indptr.diff() - 1) * sizes[3] + last_page_len).tolist()

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> Any:
        caches = [cache.transpose(1, 2) for cache in paged_kv_cache]
        outs = []
        for s, query in enumerate(q.split(self.starts.diff().tolist())):
            k, v = (pages(cache, self.tables[s], self.lengths[s]) for cache in caches)
            outs.append(attention(query, k, v, self.scale, self.causal))
        return torch.cat(outs)


class BatchDecode(FlashInferWrapper):
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        starts = torch.arange(len(indptr), dtype=torch.int32)
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan(starts, indptr, indices, last_page_len, sizes, False, sm_scale)


class BatchPrefill(FlashInferWrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        table = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan(qo_indptr, *table, sizes, causal, sm_scale)


MODULES: dict[str, Any] = {
    "prepare_fa3": SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache),
    "prepare_vllm_fa3": SimpleNamespace(flash_attn_varlen_func=vllm_flash_attn_varlen_func),
    "prepare_fa3_fwd": SimpleNamespace(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    ),
    "prepare_flashinfer": SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=BatchDecode,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefill,
    ),
}


def inputs_of(shape: AttentionShape) -> AttentionInputs:
    return AttentionInputs(shape, HEADS, 8, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_adapter_asks_for_the_same_attention(name: str, shape: AttentionShape) -> None:
    inputs = inputs_of(shape)
    call = getattr(attention_peers, name)(MODULES[name], inputs)
    assert relative_error(call(), result(inputs)) < 1e-5


def test_sdpa_knows_no_uneven_batch() -> None:
    assert prepare_sdpa(inputs_of(UNEVEN)) is None


def test_inputs_hold_the_lengths_of_the_shape() -> None:
    inputs = inputs_of(UNEVEN)
    assert inputs.seq_lens.tolist() == [40, 9, 16]
    assert inputs.query_start_loc.tolist() == [0, 1, 2, 3]
    used = [
        block
        for table, count in zip(inputs.block_tables.tolist(), (5, 2, 2), strict=True)
        for block in table[:count]
    ]
    assert sorted(used) == list(range(9)), "each block once"
    assert inputs.pool.shape == (2, 9, 2, 8, 64)


def test_only_torch_runs_on_a_cpu() -> None:
    assert [peer.name for peer in find_peers(PEERS, None, on_gpu=False)] == ["torch"]
    assert find_peers(PEERS, [], on_gpu=False) == ()
    with pytest.raises(ValueError, match="flashinfer does not run on a CPU"):
        find_peers(PEERS, ["flashinfer"], on_gpu=False)


def test_peers_are_found_by_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("flashinfer", "flash_attn_interface", "vllm", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    assert [peer.name for peer in find_peers(PEERS, None, on_gpu=True)] == ["torch"]
    with pytest.raises(ValueError, match="fa3 is not installed"):
        find_peers(PEERS, ["fa3"], on_gpu=True)
    assert capsys.readouterr().err == ""

    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", ModuleType("vllm.vllm_flash_attn"))
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", ModuleType("fa3_fwd_interface"))
    peers = find_peers(PEERS, None, on_gpu=True)
    assert [(peer.name, peer.is_paged) for peer in peers] == [
        ("fa3", True),
        ("fa3-fwd", False),
        ("torch", False),
    ]


def test_broken_installation_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(attention_peers.importlib, "import_module", broken)
    assert find_peers(PEERS, None, on_gpu=True)[0].name == "torch"
    lines = capsys.readouterr().err.splitlines()
    assert "flashinfer cannot be imported: undefined symbol: x" in lines
