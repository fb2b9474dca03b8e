"""`paged_attention` on many random batches of every kind, against float64: on a GPU 2,100 of them,
on a CPU fewer and smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import pytest
import torch

from tests.kernels.attention_batch import CACHE_LAYOUTS, HeadShape, draw_sequence, page
from tests.kernels.compare import assert_close
from tests.kernels.draw import LAYOUTS, Draw, each_dtype, random_cases, seeds

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 32)
LONGEST = 10_000


@dataclass(frozen=True)
class Limits:
    """How many cases a test has, and how large they are, so that all take less than a minute."""

    cases: int
    cached: int  # elements of all keys
    scores: int  # query heads x query tokens x cached tokens, summed over the sequences


LIMITS = {"cpu": Limits(4, 2**18, 2**20), "cuda": Limits(25, 2**21, 2**23)}


def draw_heads(draw: Draw) -> HeadShape:
    num_kv_heads = draw.choice((1, 1, 2, 3, 4, 8))
    return HeadShape(num_kv_heads * draw.choice(GROUPS), num_kv_heads, draw.choice(HEAD_DIMS))


def draw_lengths(draw: Draw, heads: HeadShape, limits: Limits) -> list[tuple[int, int]]:
    """(query_len, seq_len) of each sequence: all of one kind, or mixed."""
    num_seqs = draw.choice((1, 2, draw.between(1, 8), draw.between(1, 64)))
    tokens = limits.cached // (heads.num_kv_heads * heads.head_dim)
    longest = min(draw.choice((20, 70, 70, 300, 1500, LONGEST)), tokens // num_seqs)
    seq_lens = [draw.between(1, longest) for _ in range(num_seqs)]
    if draw.choice((True, False, False)):  # one among them may be much longer
        seq_lens[draw.between(0, num_seqs - 1)] = draw.between(1, min(LONGEST, tokens // 2))
    kinds = ("decode", "few", "prefill", "chunk", "none")
    kind = draw.choice((*kinds[:4], "mixed", "mixed"))
    scores = limits.scores // (num_seqs * heads.num_heads)
    return [
        draw_queries(draw, draw.choice(kinds) if kind == "mixed" else kind, seq_len, scores)
        for seq_len in seq_lens
    ]


def draw_queries(draw: Draw, kind: str, seq_len: int, scores: int) -> tuple[int, int]:
    """(query_len, seq_len) of one sequence whose score matrix has no more than so many elements."""
    if kind == "none":
        return 0, draw.choice((0, seq_len))
    if kind == "prefill":
        seq_len = min(seq_len, isqrt(scores))
        return seq_len, seq_len
    query_len = {"decode": 1, "few": draw.between(1, 8), "chunk": draw.between(1, seq_len)}[kind]
    return min(query_len, seq_len, max(scores // seq_len, 1)), seq_len


def draw_layouts(draw: Draw) -> dict[str, str]:
    """Half of them fit the sm_90 kernels; the other half does not, on account of one tensor or all,
    and takes the kernels of sm_80 and newer on any GPU.
    """
    layouts = {
        "query": draw.choice(LAYOUTS[:2]),
        "cache": draw.choice(CACHE_LAYOUTS[:3]),
        "out": draw.choice(LAYOUTS[:2]),
    }
    odd = draw.choice(((), (), (), (), ("query",), ("cache",), ("out",), tuple(layouts)))
    return layouts | dict.fromkeys(odd, "odd")


@each_dtype
@random_cases(28)
def test_random_batches(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    limits = LIMITS[device]
    for case_seed in seeds(seed, limits.cases):
        draw = Draw(case_seed, device)
        heads = draw_heads(draw)
        lengths = draw_lengths(draw, heads, limits)
        block_size = draw.choice((*BLOCK_SIZES, 8 * draw.between(1, 32)))
        layouts = draw_layouts(draw)
        options = {
            "scale": heads.head_dim**-0.5 * draw.choice((*[1.0] * 6, 0.5, 3.0, 0.0, -1.0)),
            "sliding_window": draw.choice((0, 0, 0, draw.between(1, 100), draw.between(1, 3000))),
            "softcap": draw.choice((0.0, 0.0, draw.uniform(0.5, 30.0))),
        }
        print(heads, f"block_size {block_size}", layouts, options, lengths)
        batch = page(
            draw,
            [draw_sequence(draw, *pair, heads, dtype) for pair in lengths],
            block_size,
            cache_layout=layouts["cache"],
            query_layout=layouts["query"],
            **options,
        )
        assert_close(batch.run(layouts["out"]), batch.expected())


@pytest.mark.cuda
@pytest.mark.parametrize("odd", [None, "query", "cache", "out"])
def test_odd_layouts_take_the_kernels_of_sm_80(seed: int, odd: str | None) -> None:
    """What the other tests count on to reach either kind on sm_90."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    draw = Draw(seed, "cuda")
    layouts = {"query": "dense", "cache": "heads first", "out": "dense"}
    if odd is not None:
        layouts[odd] = "odd"
    heads = HeadShape(4, 2, 64)
    sequences = [draw_sequence(draw, *pair, heads, torch.bfloat16) for pair in ((1, 40), (20, 50))]
    batch = page(draw, sequences, 16, cache_layout=layouts["cache"], query_layout=layouts["query"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        batch.run(layouts["out"])
        torch.cuda.synchronize()
    launched = " ".join(event.key for event in profile.key_averages())
    assert "decode_kernel" in launched, "the profiler names kernels"
    for kernel in ("decode_sm90", "prefill_sm90"):
        assert (kernel in launched) == (odd is None), launched
