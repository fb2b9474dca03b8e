"""The same attention again and again gives the same bits: what depends on the moment does not."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits
from tests.kernels.draw import Draw

NUM_SEQS, NUM_KV_HEADS, BLOCK_SIZE, NUM_BLOCKS = 120, 4, 16, 1500
LONGEST = 1500


@pytest.mark.cuda
@pytest.mark.parametrize("cache", ["bfloat16", "float8"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("query_len", [1, 2, 8])
def test_decodes_repeat(query_len: int, head_dim: int, cache: str, seed: int) -> None:
    """Of sequences of all lengths, in tiles of 8 query rows and of 16; the cache fits into the L2,
    from where tiles come soonest.
    """
    draw = Draw(seed, "cuda")
    num_heads = 4 * NUM_KV_HEADS
    lengths = [draw.between(query_len, LONGEST) for _ in range(NUM_SEQS)]
    tables = torch.zeros(NUM_SEQS, -(-LONGEST // BLOCK_SIZE), dtype=torch.int32)
    for table, length in zip(tables, lengths, strict=True):
        count = -(-length // BLOCK_SIZE)
        table[:count] = torch.tensor(draw.sample(NUM_BLOCKS, count))
    shape = (2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, head_dim)
    dtype = torch.bfloat16 if cache == "bfloat16" else torch.float8_e4m3fn
    keys, values = draw.normal(*shape, dtype=dtype).transpose(2, 3)
    query = draw.normal(NUM_SEQS * query_len, num_heads, head_dim, dtype=torch.bfloat16)
    starts = torch.arange(NUM_SEQS + 1, dtype=torch.int32, device="cuda") * query_len
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    numel = ops.paged_attention_workspace_numel(NUM_SEQS, num_heads, head_dim)
    workspace = torch.empty(numel, dtype=torch.float32, device="cuda")
    scale = torch.ones(NUM_KV_HEADS, device="cuda") if cache == "float8" else None

    def run() -> torch.Tensor:
        out = torch.full_like(query, torch.nan)
        ops.paged_attention(
            out,
            query,
            keys,
            values,
            tables,
            starts,
            seq_lens,
            max_query_len=query_len,
            max_seq_len=LONGEST,
            scale=head_dim**-0.5,
            workspace=workspace,
            k_scale=scale,
            v_scale=scale,
        )
        return out

    tables = tables.cuda()
    expected = run()
    for _ in range(200):
        assert_equal_bits(run(), expected)
