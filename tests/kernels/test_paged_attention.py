"""`paged_attention` against its reference."""

from __future__ import annotations

import pytest
import torch

from nano_vllm import ops
from tests import reference
from tests.kernels.attention_batch import HeadShape, draw_sequence, page
from tests.kernels.compare import assert_close
from tests.kernels.draw import FLOAT8, Draw, each_cache, each_dtype, random_cases

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
HEADS = ((1, 1), (3, 1), (4, 4), (6, 2), (8, 2), (8, 1), (14, 2), (9, 3), (32, 1))
"""(num_heads, num_kv_heads); groups of 1, 3, 4, 7, 8 and 32 heads."""


def draw_lengths(draw: Draw, block_size: int) -> tuple[int, int]:
    """(query_len, seq_len) of a decode, a prefill, a chunk, or a sequence with nothing to do."""
    edges = (1, block_size - 1, block_size, block_size + 1, 2 * block_size)
    seq_len = draw.choice((*edges, draw.between(1, 150)))
    query_len = draw.choice((1, seq_len, draw.between(1, seq_len), draw.choice((0, 1))))
    return query_len, seq_len if query_len else draw.choice((0, seq_len))


@each_dtype
@each_cache
@random_cases(12)
def test_random_batches(
    device: str, dtype: torch.dtype, float8: bool, seed: int, case: int
) -> None:
    draw = Draw(seed, device)
    heads = HeadShape(*draw.choice(HEADS), draw.choice(HEAD_DIMS))
    block_size = draw.choice(BLOCK_SIZES)
    sequences = [
        draw_sequence(draw, *draw_lengths(draw, block_size), heads, dtype)
        for _ in range(draw.between(1, 7))
    ]
    batch = page(
        draw,
        sequences,
        block_size,
        scale=heads.head_dim**-0.5 * draw.choice((0.5, 1.0, 3.0)),
        sliding_window=draw.choice((0, 0, draw.between(1, 100))),
        softcap=draw.choice((0.0, 0.0, draw.uniform(0.5, 30.0))),
        float8=float8,
    )
    batch.check()


@each_dtype
@each_cache
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(device: str, dtype: torch.dtype, float8: bool, seed: int, head_dim: int) -> None:
    draw = Draw(seed, device)
    heads = HeadShape(6, 2, head_dim)
    lengths = ((1, 50), (1, 131), (33, 70), (20, 20))
    sequences = [draw_sequence(draw, *pair, heads, dtype) for pair in lengths]
    for some in (sequences, sequences[:2]):
        batch = page(draw, some, draw.choice(BLOCK_SIZES), float8=float8)
        batch.check()


@each_dtype
@each_cache
@pytest.mark.parametrize("block_size", [*BLOCK_SIZES, 24])
def test_edge_lengths(
    device: str, dtype: torch.dtype, float8: bool, seed: int, block_size: int
) -> None:
    draw = Draw(seed, device)
    heads = HeadShape(4, 2, draw.choice(HEAD_DIMS))
    edges = (1, block_size - 1, block_size, block_size + 1, 2 * block_size)
    decodes = [draw_sequence(draw, 1, seq_len, heads, dtype) for seq_len in edges]
    prefills = [draw_sequence(draw, seq_len, seq_len, heads, dtype) for seq_len in edges[:4]]
    chunks = [
        draw_sequence(draw, query_len, query_len + block_size, heads, dtype)
        for query_len in (2, block_size - 1, block_size, block_size + 1)
    ]
    for sequences in (decodes, prefills, chunks, decodes + chunks[:2] + prefills[:2]):
        batch = page(draw, sequences, block_size, float8=float8)
        batch.check()


@each_dtype
@each_cache
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_head_groups(
    device: str, dtype: torch.dtype, float8: bool, seed: int, num_heads: int, num_kv_heads: int
) -> None:
    draw = Draw(seed, device)
    heads = HeadShape(num_heads, num_kv_heads, draw.choice(HEAD_DIMS))
    sequences = [draw_sequence(draw, *pair, heads, dtype) for pair in ((1, 40), (9, 25))]
    for some in (sequences, sequences[:1]):
        batch = page(draw, some, draw.choice(BLOCK_SIZES), float8=float8)
        batch.check()


@each_dtype
@pytest.mark.parametrize("sliding_window", [1, 2, 15, 16, 17, 60, 1000])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sliding_window(
    device: str, dtype: torch.dtype, seed: int, sliding_window: int, softcap: float
) -> None:
    """Windows that are smaller and larger than a block of 16, than the queries, than all."""
    draw = Draw(seed, device)
    heads = HeadShape(4, 2, 64)
    lengths = ((1, 5), (1, 16), (1, 90), (90, 90), (20, 75))
    sequences = [draw_sequence(draw, *pair, heads, dtype) for pair in lengths]
    for some in (sequences, sequences[:3]):
        batch = page(draw, some, 16, sliding_window=sliding_window, softcap=softcap)
        batch.check()


@each_dtype
@each_cache
@pytest.mark.parametrize("sliding_window", [0, 700])
@pytest.mark.parametrize("seq_len", [500, 1023, 3001])
def test_long_contexts(
    device: str, dtype: torch.dtype, float8: bool, seed: int, sliding_window: int, seq_len: int
) -> None:
    """Long enough to be split, alone and beside short ones."""
    draw = Draw(seed, device)
    heads = HeadShape(3, 1, draw.choice((64, 128)))
    block_size = draw.choice((16, 256))
    sequences = [
        draw_sequence(draw, query_len, length, heads, dtype)
        for query_len, length in ((1, seq_len), (1, seq_len + 9), (1, 3), (13, seq_len + 1))
    ]
    for some in (sequences[:1], sequences[:3], sequences):
        batch = page(draw, some, block_size, sliding_window=sliding_window, float8=float8)
        batch.check()


@each_dtype
@each_cache
@pytest.mark.parametrize(("num_seqs", "longest"), [(40, 900), (400, 90)])
def test_many_decodes(
    device: str, dtype: torch.dtype, float8: bool, seed: int, num_seqs: int, longest: int
) -> None:
    """One to eight query tokens each, among some prefills and sequences with nothing to do: fewer
    sequences than a GPU has thread blocks, and more; one is much longer than the others.
    """
    draw = Draw(seed, device)
    heads = HeadShape(*draw.choice(((4, 2), (6, 1))), 64)
    lengths = [(1, 5 * longest)]
    for _ in range(num_seqs):
        seq_len = draw.between(1, longest)
        query_len = draw.choice((1, 1, 1, draw.between(0, 8), draw.between(0, 20)))
        lengths.append((min(query_len, seq_len), seq_len))
    sequences = [draw_sequence(draw, *pair, heads, dtype) for pair in lengths]
    batch = page(draw, sequences, 16, sliding_window=draw.choice((0, 300)), float8=float8)
    batch.check()


@each_dtype
@each_cache
@pytest.mark.parametrize("query_len", [1, 30])
def test_extreme_scores(
    device: str, dtype: torch.dtype, float8: bool, seed: int, query_len: int
) -> None:
    """Scores in the thousands of either sign: the softmax neither overflows nor loses its maximum,
    wherever along the sequence that lies. Being multiples of 32 they are exact, and all but the
    largest weigh nothing.
    """
    draw = Draw(seed, device)
    heads = HeadShape(4, 2, 64)
    forwards = draw_sequence(draw, query_len, 300, heads, dtype)
    forwards.query = 8 * draw.integers(-4, 4, *forwards.query.shape, dtype=dtype)
    forwards.keys = 4 * draw.integers(-4, 4, *forwards.keys.shape, dtype=dtype)
    backwards = draw_sequence(draw, query_len, 300, heads, dtype)
    backwards.query, backwards.keys = forwards.query, forwards.keys.flip(0)
    for scale in (1.0, -1.0):
        batch = page(
            draw,
            [forwards, backwards],
            32,
            scale=scale,
            float8=float8,
            k_scale=None,  # it would round
            v_scale=None,
        )
        batch.check()


@each_dtype
@pytest.mark.parametrize("query_len", [1, 12])
def test_every_float8(device: str, dtype: torch.dtype, seed: int, query_len: int) -> None:
    """Each finite number of a float8 cache, as a value that is all there is to see, and as the one
    element of a key that meets its inverse in the query.
    """
    draw = Draw(seed, device)
    heads, scale = HeadShape(2, 1, 64), torch.full((1,), 0.5, device=device)
    bits = torch.tensor([i for i in range(256) if i % 128 not in (0, 127)], dtype=torch.uint8)
    numbers = bits.view(FLOAT8).to(device, dtype)
    sequences = [draw_sequence(draw, query_len, query_len, heads, dtype) for _ in numbers]
    for i, (sequence, number) in enumerate(zip(sequences, numbers, strict=True)):
        sequence.values[:] = number
        sequence.keys.zero_()
        sequence.keys[0, 0, i % 64] = number
        sequence.query[..., i % 64] = 4 / number
    for sequence in sequences:
        sequence.values *= scale  # which the cache is without
    batch = page(draw, sequences, 16, scale=0.25, float8=True, k_scale=None, v_scale=scale)
    expected = (numbers / 2)[:, None].expand(-1, query_len).reshape(-1, 1, 1).expand(-1, 2, 64)
    assert_close(batch.run(), expected.double())

    batch.value_cache[:, :query_len] = draw.normal(
        *batch.value_cache[:, :query_len].shape, dtype=dtype
    ).to(FLOAT8)
    assert_close(batch.run(), batch.expected())


@each_dtype
def test_shared_prefix(device: str, dtype: torch.dtype, seed: int) -> None:
    """Two sequences may have blocks in common."""
    draw = Draw(seed, device)
    heads = HeadShape(4, 2, 80)
    batch = page(draw, [draw_sequence(draw, 1, 40, heads, dtype) for _ in range(2)], 16)
    batch.block_tables[1, :2] = batch.block_tables[0, :2]
    batch.check()


@each_dtype
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_nothing_to_do(device: str, dtype: torch.dtype, seed: int, num_seqs: int) -> None:
    draw = Draw(seed, device)
    heads = HeadShape(4, 2, 64)
    for seq_len in (0, 20):  # 20: cached tokens, none of which is queried in this step
        sequences = [draw_sequence(draw, 0, seq_len, heads, dtype) for _ in range(num_seqs)]
        assert page(draw, sequences, 8).run().shape[0] == 0


def test_no_sequences(device: str, seed: int) -> None:
    draw = Draw(seed, device)
    batch = page(draw, [draw_sequence(draw, 1, 9, HeadShape(2, 1, 64), torch.float32)], 8)
    batch.block_tables, batch.seq_lens = batch.block_tables[:0], batch.seq_lens[:0]
    batch.query_start_loc = batch.query_start_loc[:1]
    assert batch.run().shape[0] == 0


@each_dtype
def test_chunks_make_the_whole(device: str, dtype: torch.dtype, seed: int) -> None:
    """A prompt in chunks, as chunked prefill cuts it, attends as in one piece."""
    draw = Draw(seed, device)
    whole = draw_sequence(draw, 100, 100, HeadShape(4, 2, 64), dtype)
    expected = page(draw, [whole], 16).expected()
    for start, end in ((0, 1), (1, 33), (33, 64), (64, 99), (99, 100)):
        chunk = draw_sequence(draw, 0, 0, HeadShape(4, 2, 64), dtype)
        chunk.query, chunk.keys, chunk.values = (
            whole.query[start:end],
            whole.keys[:end],
            whole.values[:end],
        )
        assert_close(page(draw, [chunk], 16).run(), expected[start:end])


@each_dtype
def test_reference_is_sdpa(dtype: torch.dtype, seed: int) -> None:
    """The oracle itself against torch's attention, on one sequence without paging."""
    draw = Draw(seed, "cpu")
    sequence = draw_sequence(draw, 30, 47, HeadShape(6, 2, 64), dtype)
    batch = page(draw, [sequence], 16)
    mask = torch.ones(30, 47, dtype=torch.bool).tril(diagonal=17)
    query, keys, values = (
        tensor.double().transpose(0, 1)[None]
        for tensor in (sequence.query, sequence.keys, sequence.values)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(batch.expected(), expected[0].transpose(0, 1))


def test_options_are_those_of_the_reference() -> None:
    assert reference.paged_attention.__kwdefaults__ == ops.paged_attention.__kwdefaults__
