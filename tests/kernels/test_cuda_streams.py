"""The ops run on torch's current stream and neither allocate nor synchronise: a CUDA graph can
capture them.
"""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.compare import assert_close, assert_equal_bits
from tests.kernels.draw import Draw
from tests.kernels.graph_capture import capture

pytestmark = pytest.mark.cuda

NUM_SEQS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 3, 6, 2, 64, 16, 120


class DecodeStep:
    """One layer's ops of a decode step on tensors that stay where they are."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        dtype = torch.bfloat16
        self.query = draw.normal(NUM_SEQS, NUM_HEADS, HEAD_DIM, dtype=dtype)
        self.key = draw.normal(NUM_SEQS, NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
        self.value = draw.normal(NUM_SEQS, NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
        self.weight = draw.normal(HEAD_DIM, dtype=dtype)
        self.cos_sin_cache = draw.normal(1000, HEAD_DIM, dtype=torch.float32)
        self.caches = [
            draw.normal(NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
            for _ in range(2)
        ]
        self.block_tables = torch.tensor(
            [draw.sample(NUM_BLOCKS, 40) for _ in range(NUM_SEQS)], dtype=torch.int32, device="cuda"
        )
        self.query_start_loc = torch.arange(NUM_SEQS + 1, dtype=torch.int32, device="cuda")
        self.seq_lens = torch.zeros(NUM_SEQS, dtype=torch.int32, device="cuda")
        self.positions = torch.zeros(NUM_SEQS, dtype=torch.int64, device="cuda")
        self.slot_mapping = torch.full((NUM_SEQS,), -1, dtype=torch.int64, device="cuda")
        self.workspace = torch.empty(
            ops.paged_attention_workspace_numel(NUM_SEQS, NUM_HEADS, HEAD_DIM), device="cuda"
        )
        self.out = torch.empty_like(self.query)
        self.advance()

    def advance(self) -> None:
        """New tokens at new positions."""
        seq_lens = [self.draw.between(1, 40 * BLOCK_SIZE) for _ in range(NUM_SEQS)]
        self.seq_lens.copy_(torch.tensor(seq_lens))
        self.positions.copy_(self.seq_lens - 1)
        last = self.positions // BLOCK_SIZE
        blocks = self.block_tables.gather(1, last[:, None])[:, 0].long()
        self.slot_mapping.copy_(blocks * BLOCK_SIZE + self.positions % BLOCK_SIZE)
        for tensor in (self.query, self.key, self.value):
            tensor.copy_(self.draw.normal(*tensor.shape, dtype=tensor.dtype))

    def run(self) -> None:
        ops.rotary_reshape_and_cache(
            self.positions,
            self.query,
            self.key,
            self.value,
            *self.caches,
            self.slot_mapping,
            self.cos_sin_cache,
            query_norm_weight=self.weight,
            norm_eps=1e-6,
        )
        ops.paged_attention(
            self.out,
            self.query,
            *self.caches,
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
            max_query_len=1,
            max_seq_len=40 * BLOCK_SIZE,
            scale=HEAD_DIM**-0.5,
            workspace=self.workspace,
        )

    def expected(self) -> torch.Tensor:
        """Of the attention, given what the step has made of query and cache."""
        out = torch.empty_like(self.query, dtype=torch.float64)
        reference.paged_attention(
            out,
            self.query,
            *self.caches,
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
            max_query_len=1,
            max_seq_len=40 * BLOCK_SIZE,
            scale=HEAD_DIM**-0.5,
        )
        return out


def test_side_stream(seed: int) -> None:
    """Work queued before on the same stream is awaited, though it takes long."""
    step = DecodeStep(Draw(seed, "cuda"))
    query = step.query.clone()
    slow = torch.randn(6000, 6000, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step.query.fill_(torch.nan)
        for _ in range(20):
            slow = slow @ slow * 1e-2
        step.query.copy_(query)
        step.run()
    stream.synchronize()
    assert_close(step.out, step.expected())


def test_graph(seed: int) -> None:
    """A captured step replays on new values in the same tensors, with the bits of an eager one."""
    step = DecodeStep(Draw(seed, "cuda"))
    graph = capture(step.run)
    for _ in range(3):
        step.advance()
        query, key = step.query.clone(), step.key.clone()
        step.out.fill_(torch.nan)
        graph.replay()
        replayed = step.out.clone()
        assert_close(replayed, step.expected())
        step.query.copy_(query)
        step.key.copy_(key)
        step.run()
        assert_equal_bits(step.out, replayed)
