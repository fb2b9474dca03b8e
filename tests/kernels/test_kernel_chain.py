"""Kernels of a step that start while those before them still run: in a CUDA graph, layer behind
layer, they give the bits that each gives alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits
from tests.kernels.draw import Draw
from tests.kernels.graph_capture import capture

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 4, 128
BLOCK_SIZE, NUM_BLOCKS, MAX_POSITION = 16, 1500, 4000
NUM_LAYERS = 6


class Layers:
    """Each layer writes its keys and values, attends, and hands its output on: what a kernel reads
    too early is of the layer before, or of the replay before.

    Args:
        query_lens: of each sequence.
        has_prefix: whether all decodes begin with the same blocks.
    """

    def __init__(
        self, draw: Draw, query_lens: list[int], dtype: torch.dtype, has_prefix: bool
    ) -> None:
        self.draw, self.query_lens = draw, query_lens
        num_tokens, device = sum(query_lens), draw.device
        size = NUM_HEADS * HEAD_DIM
        self.input = draw.normal(num_tokens, size, dtype=dtype)
        self.weights = [draw.normal(size, dtype=dtype) for _ in range(NUM_LAYERS)]
        self.keys = [
            draw.normal(num_tokens, 2 * NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
            for _ in range(NUM_LAYERS)
        ]
        shape = (NUM_LAYERS, 2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.cache = draw.normal(*shape, dtype=dtype).transpose(-2, -3)
        self.cos_sin = draw.normal(MAX_POSITION, HEAD_DIM, dtype=torch.float32)
        self.query_start_loc = torch.tensor([0, *query_lens], device=device).cumsum(0).int()
        num_seqs = len(query_lens)
        self.seq_lens = torch.zeros(num_seqs, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_seqs, 250, dtype=torch.int32, device=device)
        self.positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.slots = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.shared_prefix = (
            torch.zeros(2, num_seqs, dtype=torch.int32, device=device) if has_prefix else None
        )
        self.outs = [torch.zeros_like(self.input) for _ in range(NUM_LAYERS)]
        self.workspace = torch.full(
            (ops.paged_attention_workspace_numel(num_seqs, NUM_HEADS, HEAD_DIM),),
            torch.nan,
            device=device,
        )
        self.renew()

    def renew(self) -> None:
        """Other lengths, blocks and inputs in the same tensors."""
        draw = self.draw
        self.input.copy_(draw.normal(*self.input.shape, dtype=self.input.dtype))
        free = draw.sample(NUM_BLOCKS, NUM_BLOCKS)
        seq_lens, tables, positions, slots = [], [], [], []
        num_shared = 0 if self.shared_prefix is None else draw.between(5, 60)
        shared = draw.sample(NUM_BLOCKS, num_shared)
        for query_len in self.query_lens:
            prefix = shared if query_len == 1 else []
            least = query_len + len(prefix) * BLOCK_SIZE
            seq_lens.append(draw.between(least, draw.choice((least + 40, least + 1500))))
            num_read = (seq_lens[-1] - query_len) // BLOCK_SIZE
            num_written = -(-seq_lens[-1] // BLOCK_SIZE) - num_read
            # What is only read may be anybody's.
            blocks = prefix + draw.sample(NUM_BLOCKS, num_read - len(prefix))
            blocks += [free.pop() for _ in range(num_written)]
            tables.append([*blocks, *[0] * (250 - len(blocks))])
            for position in range(seq_lens[-1] - query_len, seq_lens[-1]):
                positions.append(position)
                slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        for tensor, values in (
            (self.seq_lens, seq_lens),
            (self.block_tables, tables),
            (self.positions, positions),
            (self.slots, slots),
        ):
            tensor.copy_(torch.tensor(values))
        if self.shared_prefix is not None:
            leader = self.query_lens.index(1)
            self.shared_prefix[0] = leader
            self.shared_prefix[1] = torch.tensor(
                [num_shared * BLOCK_SIZE * (query_len == 1) for query_len in self.query_lens]
            )

    def run(self, behind_each: Callable[[], None] = lambda: None) -> None:
        max_query_len = max(self.query_lens)
        ops.plan_attention(
            self.workspace,
            self.query_start_loc,
            self.seq_lens,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            max_query_len=max_query_len,
            shared_prefix=self.shared_prefix,
        )
        behind_each()
        hidden, residual = self.input, self.input.clone()
        for layer in range(NUM_LAYERS):
            query = hidden.clone().view(-1, NUM_HEADS, HEAD_DIM)
            key, value = self.keys[layer].split(NUM_KV_HEADS, dim=1)
            ops.rotary_reshape_and_cache(
                self.positions, query, key.clone(), value, *self.cache[layer], self.slots,
                self.cos_sin, is_neox=True,
            )  # fmt: skip
            behind_each()
            out = torch.full_like(query, torch.nan)
            ops.paged_attention(
                out,
                query,
                *self.cache[layer],
                self.block_tables,
                self.query_start_loc,
                self.seq_lens,
                max_query_len=max_query_len,
                max_seq_len=MAX_POSITION,
                scale=HEAD_DIM**-0.5,
                workspace=self.workspace,
                is_planned=True,
                shared_prefix=self.shared_prefix,
            )
            behind_each()
            hidden = self.outs[layer]
            ops.fused_add_rms_norm(
                hidden, out.view(hidden.shape), residual, self.weights[layer], 1e-6
            )
            behind_each()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("kind", "has_prefix"),
    [
        ("decodes", False),
        ("decodes", True),
        ("prefills", False),
        ("few prefills", False),
        ("few prefills", True),
        ("many of both", False),
        ("many of both", True),
    ],
)
def test_layers_give_the_bits_of_kernels_that_run_alone(
    kind: str, has_prefix: bool, seed: int
) -> None:
    draw = Draw(seed, "cuda")
    query_lens = {
        "decodes": [1] * 90,
        "prefills": [600, 130, 70],
        "few prefills": [1] * 70 + [64],
        "many of both": [1] * 120 + [300, 500, 20, 9],
    }[kind]
    layers = Layers(draw, query_lens, torch.bfloat16, has_prefix)
    graph = capture(layers.run)
    for _ in range(8):
        layers.renew()
        layers.run(torch.cuda.synchronize)
        expected = [out.clone() for out in layers.outs]
        caches = layers.cache.clone()
        for out in layers.outs:
            out.fill_(torch.nan)
        graph.replay()
        graph.replay()  # whose first kernels meet the last ones of the replay before
        for out, alone in zip(layers.outs, expected, strict=True):
            assert_equal_bits(out, alone)
        assert_equal_bits(layers.cache, caches)
