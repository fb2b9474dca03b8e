"""Every op in a CUDA graph: replayed on new values in the same tensors, it gives the bits of an
eager call on these values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import getmembers, isfunction

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits
from tests.kernels.draw import Draw, each_dtype
from tests.kernels.graph_capture import capture
from tests.kernels.sampling import adjust_arguments, sample_arguments

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 13, 8, 2, 128
BLOCK_SIZE, NUM_BLOCKS, MAX_POSITION = 16, 20, 500


@dataclass
class Captured:
    """An op on tensors that stay where they are."""

    run: Callable[[], None]
    renew: Callable[[], None]  # puts new values into all that the op reads
    written: list[torch.Tensor]  # some of which it may read as well


def renew_normals(draw: Draw, tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(draw.normal(*tensor.shape, dtype=tensor.dtype))


def slots(draw: Draw) -> torch.Tensor:
    """A slot for each token, none twice; some tokens are padding."""
    found = torch.tensor(draw.sample(NUM_BLOCKS * BLOCK_SIZE, NUM_TOKENS))
    found[draw.sample(NUM_TOKENS, draw.between(0, 3))] = -1
    return found.to(draw.device)


def pairs(draw: Draw) -> torch.Tensor:
    """Blocks of the first half to blocks of the second."""
    half = NUM_BLOCKS // 2
    sources, targets = torch.tensor([draw.sample(half, 4), draw.sample(half, 4)])
    return torch.stack((sources, targets + half), dim=1).to(draw.device)


def caches(draw: Draw, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys and values as the engine has them."""
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return [draw.normal(*shape, dtype=dtype).transpose(1, 2) for _ in range(2)]


def reshape_and_cache(draw: Draw, dtype: torch.dtype) -> Captured:
    key, value = (draw.normal(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    cache, slot_mapping = caches(draw, dtype), slots(draw)

    def renew() -> None:
        renew_normals(draw, [key, value])
        slot_mapping.copy_(slots(draw))

    return Captured(lambda: ops.reshape_and_cache(key, value, *cache, slot_mapping), renew, cache)


def rotary_reshape_and_cache(draw: Draw, dtype: torch.dtype) -> Captured:
    query = draw.normal(NUM_TOKENS, NUM_HEADS, HEAD_DIM, dtype=dtype)
    key, value = (draw.normal(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    cos_sin_cache = draw.normal(MAX_POSITION, HEAD_DIM, dtype=torch.float32)
    weights = [draw.normal(HEAD_DIM, dtype=dtype) for _ in range(2)]
    cache, slot_mapping = caches(draw, dtype), slots(draw)
    positions = torch.zeros_like(slot_mapping)
    arguments = (positions, query, key, value, *cache, slot_mapping, cos_sin_cache)

    def run() -> None:
        ops.rotary_reshape_and_cache(
            *arguments, query_norm_weight=weights[0], key_norm_weight=weights[1], norm_eps=1e-6
        )
        ops.rotary_reshape_and_cache(*arguments, is_neox=False)

    def renew() -> None:
        renew_normals(draw, [query, key, value, cos_sin_cache, *weights])
        slot_mapping.copy_(slots(draw))
        positions.copy_(draw.integers(0, MAX_POSITION - 1, NUM_TOKENS, dtype=torch.int64))

    return Captured(run, renew, [query, *cache])


def qkv_linear(draw: Draw, dtype: torch.dtype) -> Captured:
    dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    query = torch.empty(NUM_TOKENS, NUM_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    weight = draw.normal((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, 64, dtype=dtype)
    input = draw.normal(NUM_TOKENS, 64, dtype=dtype)
    cos_sin_cache = draw.normal(MAX_POSITION, HEAD_DIM, dtype=torch.float32)
    cache, slot_mapping = caches(draw, dtype), slots(draw)
    positions = torch.zeros_like(slot_mapping)

    def renew() -> None:
        renew_normals(draw, [input, weight, cos_sin_cache])
        slot_mapping.copy_(slots(draw))
        positions.copy_(draw.integers(0, MAX_POSITION - 1, NUM_TOKENS, dtype=torch.int64))

    def run() -> None:
        ops.qkv_linear(query, input, weight, None, positions, *cache, slot_mapping, cos_sin_cache)

    return Captured(run, renew, [query, *cache])


def copy_blocks(draw: Draw, dtype: torch.dtype) -> Captured:
    shape = (3, 2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pool, block_mapping = draw.normal(*shape, dtype=dtype), pairs(draw)

    def renew() -> None:
        renew_normals(draw, [pool])
        block_mapping.copy_(pairs(draw))

    return Captured(lambda: ops.copy_blocks(pool, block_mapping), renew, [pool])


def swap_blocks(draw: Draw, dtype: torch.dtype) -> Captured:
    shape = (3, 2, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    source, target = (draw.normal(*shape, dtype=dtype) for _ in range(2))
    host, there = target.cpu().pin_memory(), pairs(draw)
    back = there.flip(1)

    def run() -> None:
        ops.swap_blocks(source, host, there)
        ops.swap_blocks(host, target, back)

    def renew() -> None:
        renew_normals(draw, [source])
        there.copy_(pairs(draw))
        back.copy_(there.flip(1))

    return Captured(run, renew, [host, target])


def rms_norm(draw: Draw, dtype: torch.dtype) -> Captured:
    input, weight = draw.normal(NUM_TOKENS, 512, dtype=dtype), draw.normal(512, dtype=dtype)
    out = torch.zeros_like(input)
    return Captured(
        lambda: ops.rms_norm(out, input, weight, 1e-6),
        lambda: renew_normals(draw, [input, weight]),
        [out],
    )


def fused_add_rms_norm(draw: Draw, dtype: torch.dtype) -> Captured:
    input, residual = (draw.normal(NUM_TOKENS, 512, dtype=dtype) for _ in range(2))
    weight, out = draw.normal(512, dtype=dtype), torch.zeros_like(input)
    return Captured(
        lambda: ops.fused_add_rms_norm(out, input, residual, weight, 1e-6),
        lambda: renew_normals(draw, [input, residual, weight]),
        [out, residual],
    )


def silu_and_mul(draw: Draw, dtype: torch.dtype) -> Captured:
    input = draw.normal(NUM_TOKENS, 512, dtype=dtype)
    out = torch.zeros_like(input[:, :256])
    return Captured(
        lambda: ops.silu_and_mul(out, input), lambda: renew_normals(draw, [input]), [out]
    )


def sample_tokens(draw: Draw, dtype: torch.dtype) -> Captured:
    def given() -> dict[str, torch.Tensor]:
        each = [draw.uniform(0.1, 1) for _ in range(4 * NUM_TOKENS)]
        return sample_arguments(
            draw.normal(NUM_TOKENS, 5000, dtype=dtype),
            temperatures=each[:NUM_TOKENS],
            top_k=[draw.choice((0, 20)) for _ in range(NUM_TOKENS)],
            top_p=each[NUM_TOKENS : 2 * NUM_TOKENS],
            min_p=[value / 9 for value in each[2 * NUM_TOKENS : 3 * NUM_TOKENS]],
            seq_lens=[draw.between(5, 99) for _ in range(NUM_TOKENS)],
        )

    arguments = given()
    out = torch.zeros(NUM_TOKENS, dtype=torch.int64, device=draw.device)

    def renew() -> None:
        for name, fresh in given().items():
            arguments[name].copy_(fresh)

    return Captured(lambda: ops.sample_tokens(out, **arguments), renew, [out])


def adjust_logits(draw: Draw, dtype: torch.dtype) -> Captured:
    def given() -> dict[str, torch.Tensor]:
        said = [[draw.between(0, 99) for _ in range(20)] for _ in range(NUM_TOKENS)]
        return adjust_arguments(
            draw.normal(NUM_TOKENS, 100, dtype=dtype),
            said,
            [draw.between(1, 20) for _ in range(NUM_TOKENS)],
            repetition=[draw.uniform(0.5, 2) for _ in range(NUM_TOKENS)],
            presence=[draw.uniform(-2, 2) for _ in range(NUM_TOKENS)],
            bias=[{draw.between(0, 99): draw.uniform(-9, 9)} for _ in range(NUM_TOKENS)],
        )

    arguments = given()
    out = torch.zeros(NUM_TOKENS, 100, device=draw.device)

    def renew() -> None:
        for name, fresh in given().items():
            arguments[name].copy_(fresh)

    return Captured(lambda: ops.adjust_logits(out, **arguments), renew, [out])


def linear(draw: Draw, dtype: torch.dtype) -> Captured:
    return linear_of(ops.linear, draw, dtype, 1)


def linear_silu_and_mul(draw: Draw, dtype: torch.dtype) -> Captured:
    return linear_of(ops.linear_silu_and_mul, draw, dtype, 2)


def linear_of(
    op: Callable[..., None], draw: Draw, dtype: torch.dtype, num_stacked: int
) -> Captured:
    dtype = torch.float16 if dtype == torch.float32 else dtype  # which it is not for
    input = draw.normal(NUM_TOKENS, 1024, dtype=dtype)
    weight = draw.normal(num_stacked * 512, 1024, dtype=dtype)
    out = input.new_zeros(NUM_TOKENS, 512)
    torch.cuda.synchronize()
    return Captured(lambda: op(out, input, weight), lambda: renew_normals(draw, [input]), [out])


def gelu_and_mul(draw: Draw, dtype: torch.dtype) -> Captured:
    input = draw.normal(NUM_TOKENS, 512, dtype=dtype)
    outs = {how: torch.zeros_like(input[:, :256]) for how in ("none", "tanh")}

    def run() -> None:
        for approximate, out in outs.items():
            ops.gelu_and_mul(out, input, approximate)

    return Captured(run, lambda: renew_normals(draw, [input]), [*outs.values()])


QUERY_LENS = {"decode": (0, 1), "few": (0, 8), "prefill": (9, 70), "mixed": (0, 70)}
"""Query tokens of a sequence, at the least and at the most."""


class Attention:
    """`plan_attention` and `paged_attention` on batches of one size, of other lengths each time;
    `out_layout` "odd" takes the kernels of sm_80 and newer on sm_90.
    """

    num_seqs, max_blocks = 9, 120

    def __init__(self, draw: Draw, dtype: torch.dtype, kind: str, out_layout: str) -> None:
        self.draw = draw
        self.min_query_len, self.max_query_len = QUERY_LENS[kind]
        num_tokens = self.num_seqs * self.max_query_len
        self.query = draw.normal(num_tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)
        self.caches = caches(draw, dtype)
        self.out = draw.output(*self.query.shape, dtype=dtype, layout=out_layout)
        self.query_start_loc, self.seq_lens, self.block_tables = self.lengths()
        self.workspace = draw.output(
            ops.paged_attention_workspace_numel(self.num_seqs, NUM_HEADS, HEAD_DIM),
            dtype=torch.float32,
            layout="dense",
        )

    def lengths(self) -> list[torch.Tensor]:
        """query_start_loc, seq_lens and block_tables; short sequences and long ones."""
        longest = self.max_blocks * BLOCK_SIZE
        query_lens, seq_lens = [], []
        for _ in range(self.num_seqs):
            query_lens.append(self.draw.between(self.min_query_len, self.max_query_len))
            least = max(query_lens[-1], 1)
            seq_lens.append(self.draw.between(least, self.draw.choice((least + 60, longest))))
        starts = [sum(query_lens[:s]) for s in range(self.num_seqs + 1)]
        tables = self.draw.integers(
            0, NUM_BLOCKS - 1, self.num_seqs, self.max_blocks, dtype=torch.int32
        )
        return [
            torch.tensor(values, dtype=torch.int32, device=self.draw.device)
            for values in (starts, seq_lens)
        ] + [tables]

    def renew(self) -> None:
        renew_normals(self.draw, [self.query, *self.caches])
        renewed = self.query_start_loc, self.seq_lens, self.block_tables
        for tensor, values in zip(renewed, self.lengths(), strict=True):
            tensor.copy_(values)
        self.out.fill_(torch.nan)
        self.workspace.fill_(torch.nan)

    def plan(self) -> None:
        ops.plan_attention(
            self.workspace,
            self.query_start_loc,
            self.seq_lens,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            max_query_len=self.max_query_len,
        )

    def run(self, is_planned: bool) -> None:
        """With the plan made here, in a launch of its own, or by the op."""
        if is_planned:
            self.plan()
        ops.paged_attention(
            self.out,
            self.query,
            *self.caches,
            self.block_tables,
            self.query_start_loc,
            self.seq_lens,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_blocks * BLOCK_SIZE,
            scale=HEAD_DIM**-0.5,
            workspace=self.workspace,
            is_planned=is_planned,
        )


def plan_attention(draw: Draw, dtype: torch.dtype) -> Captured:
    attention = Attention(draw, dtype, "few", "dense")
    return Captured(attention.plan, attention.renew, [attention.workspace])


OPS: dict[str, Callable[[Draw, torch.dtype], Captured]] = {
    build.__name__: build
    for build in (
        copy_blocks,
        fused_add_rms_norm,
        gelu_and_mul,
        linear,
        linear_silu_and_mul,
        plan_attention,
        qkv_linear,
        reshape_and_cache,
        rms_norm,
        rotary_reshape_and_cache,
        adjust_logits,
        sample_tokens,
        silu_and_mul,
        swap_blocks,
    )
}


def assert_replays(captured: Captured) -> None:
    graph = capture(captured.run)
    for _ in range(3):
        captured.renew()
        before = [tensor.clone() for tensor in captured.written]
        graph.replay()
        torch.cuda.synchronize()  # the host writes and reads pinned memory itself
        replayed = [tensor.clone() for tensor in captured.written]
        for tensor, values in zip(captured.written, before, strict=True):
            tensor.copy_(values)
        captured.run()
        torch.cuda.synchronize()
        for tensor, values in zip(captured.written, replayed, strict=True):
            assert_equal_bits(tensor, values)


@pytest.mark.cuda
@each_dtype
@pytest.mark.parametrize("op", OPS)
def test_op(dtype: torch.dtype, seed: int, op: str) -> None:
    assert_replays(OPS[op](Draw(seed, "cuda"), dtype))


@pytest.mark.cuda
@each_dtype
@pytest.mark.parametrize("kind", QUERY_LENS)
@pytest.mark.parametrize("is_planned", [False, True])
@pytest.mark.parametrize("out_layout", ["dense", "odd"])
def test_paged_attention(
    dtype: torch.dtype, seed: int, kind: str, is_planned: bool, out_layout: str
) -> None:
    attention = Attention(Draw(seed, "cuda"), dtype, kind, out_layout)
    assert_replays(Captured(lambda: attention.run(is_planned), attention.renew, [attention.out]))


def test_no_op_is_missing() -> None:
    on_cuda = {name for name, _ in getmembers(ops, isfunction)} - {
        "has_cuda",
        "paged_attention_workspace_numel",
        "linear_max_rows",
        "linear_silu_and_mul_pays",
        "qkv_linear_pays",
        "quantized_linear",
    }
    # On several ranks test_all_reduce replays it.
    on_cuda -= {name for name in on_cuda if "peer_buffer" in name} | {"all_reduce"}
    assert on_cuda == {*OPS, "paged_attention"}
