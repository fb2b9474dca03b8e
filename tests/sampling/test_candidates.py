"""What ranks send of logits that they share is little, and enough for the tokens of whole rows."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from nano_vllm.distributed.partition import vocabulary_part
from nano_vllm.sampling.candidates import gather_candidates
from nano_vllm.sampling.gathering import (
    FEW_BYTES,
    LIKELIEST,
    MAX_CANDIDATES,
    WHOLE,
    bytes_of_row,
    quickest,
)
from nano_vllm.sampling.greedy import likeliest_tokens
from nano_vllm.sampling.sampler import Sampler
from nano_vllm.sequence import Sequence
from tests.distributed.thread_ranks import thread_ranks
from tests.kernels.graph_capture import capture
from tests.sampling.test_sampler import choose, make_sequence

INF = math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sample_by_ranks(
    logits: torch.Tensor, sequences: list[Sequence], size: int
) -> tuple[list[int], int, int]:
    """As `ModelRunner` and `Follower` do.

    Returns:
        tokens; bytes that each rank has sent for each row; in which way.
    """
    vocab_size = logits.shape[1]
    part = vocabulary_part(vocab_size, size)
    num_candidates = Sampler(64).num_candidates(sequences, 0, logits.device)
    ranks = thread_ranks(size)

    def run(rank: int) -> torch.Tensor | None:
        held = range(min(rank * part, vocab_size), min((rank + 1) * part, vocab_size))
        own = logits.new_full((len(logits), part), 99.0)  # which no one has scored
        own[:, : len(held)] = logits[:, held.start : held.stop]
        if num_candidates == LIKELIEST:
            return likeliest_tokens(own, held, ranks[rank])
        if num_candidates == WHOLE:
            gathered = ranks[rank].gather_columns(own, vocab_size)
        else:
            gathered = gather_candidates(own, held, num_candidates, ranks[rank], vocab_size)
        assert (gathered is None) == (rank > 0)
        return None if gathered is None else choose(Sampler(64), gathered, sequences)

    with ThreadPoolExecutor(size) as threads:
        tokens = next(iter(threads.map(run, range(size))))
    assert tokens is not None
    (sent,) = {rank.num_bytes for rank in ranks}
    assert sent == len(sequences) * bytes_of_row(num_candidates, part, logits.itemsize)
    return tokens.tolist(), sent // len(sequences), num_candidates


def draw_logits(draw: random.Random, num_rows: int, vocab_size: int) -> torch.Tensor:
    """Of all kinds: with few ties and many, flat and peaked, with tokens that are ruled out."""
    generator = torch.Generator().manual_seed(draw.getrandbits(60))
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    logits *= draw.choice((0.0, 0.01, 1.0, 5.0))
    if draw.random() < 0.5:
        logits = (logits * draw.choice((1, 4))).round()
    if draw.random() < 0.2:
        logits[:, draw.randrange(vocab_size) :] = draw.choice((-INF, -3.0))
    if draw.random() < 0.2:
        logits[draw.randrange(num_rows), draw.randrange(vocab_size)] = draw.choice((math.nan, INF))
    return logits.to(draw.choice(DTYPES))


def draw_sequence(draw: random.Random, seq_id: int) -> Sequence:
    """Greedy, or with a top-k."""
    return make_sequence(
        seq_id,
        temperature=draw.choice((0.0, 0.7, 1.0, 3.0)),
        top_k=draw.choice((1, 2, 3, 20, draw.randint(1, MAX_CANDIDATES))),
        top_p=draw.choice((1.0, 1.0, 0.9, draw.uniform(0.01, 1.0))),
        min_p=draw.choice((0.0, 0.0, draw.random())),
        seed=draw.choice((None, draw.getrandbits(31))),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_tokens_are_those_of_whole_rows(device: str, size: int, seed: int) -> None:
    draw = random.Random(seed + size)
    ways = set()
    for _ in range(300):
        num_rows = draw.choice((1, 2, 5, 16))
        logits = draw_logits(draw, num_rows, draw.choice((3, 30, 199, 1000, 4096, 20_001)))
        logits = logits.to(device)
        sequences = [draw_sequence(draw, row) for row in range(num_rows)]
        expected = choose(Sampler(64), logits, sequences).tolist()
        tokens, _, way = sample_by_ranks(logits, sequences, size)
        assert tokens == expected
        ways.add(way)
    assert WHOLE not in ways
    assert {LIKELIEST, 1} < ways


@pytest.mark.parametrize("size", [2, 4])
def test_ties_at_the_last_place_stay_together(size: int) -> None:
    """More tokens than a rank sends are as likely as the k-th: any of them may be drawn."""
    logits = torch.zeros(1, 1000)
    logits[:, ::3] = 1.0
    logits[:, 700] = 1.5
    draws = [sample_by_ranks(logits, [make_sequence(i, top_k=2)], size)[0][0] for i in range(300)]
    assert {token % 3 for token in draws} == {0, 1}
    assert len(set(draws)) > 150
    expected = [choose(Sampler(64), logits, [make_sequence(i, top_k=2)]).item() for i in range(300)]
    assert draws == expected


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ([{"temperature": 0.0}], LIKELIEST),
        ([{"temperature": 0.0, "top_k": 7}], LIKELIEST),
        ([{"top_k": 7}], 7),
        ([{"top_k": 7}, {"top_k": 40, "top_p": 0.9, "min_p": 0.1}], 40),
        ([{"temperature": 0.0, "top_k": 99}, {"top_k": 7}, {"temperature": 0.0}], 7),
        ([{"top_k": MAX_CANDIDATES}], MAX_CANDIDATES),
        ([{"top_k": MAX_CANDIDATES + 1}], WHOLE),
        ([{"top_k": 7}, {}], WHOLE),
        ([{"top_k": 7}, {"top_k": -1}], WHOLE),
        ([{"top_p": 0.5}], WHOLE),
        ([{"temperature": 0.0, "logprobs": 1}], WHOLE),
        ([{"top_k": 7, "logprobs": 0}], WHOLE),
        ([{"top_k": 7, "presence_penalty": 0.5}], WHOLE),
        ([{"top_k": 7, "logit_bias": {3: 1.0}}], WHOLE),
        ([{"top_k": 7, "allowed_token_ids": [3]}], WHOLE),
        ([{"top_k": 7, "bad_words": ((3,),)}], WHOLE),
        ([{"top_k": 7, "min_tokens": 2, "end_token_ids": frozenset({3})}], WHOLE),
    ],
    ids=str,
)
def test_no_more_is_sent_than_is_needed(settings: list[dict[str, Any]], way: int) -> None:
    sequences = [make_sequence(row, **each) for row, each in enumerate(settings)]
    logits = torch.randn(len(sequences), 32_000, dtype=torch.float32).bfloat16()
    _, num_bytes, found = sample_by_ranks(logits, sequences, 2)
    assert found == way
    if way == LIKELIEST:
        assert num_bytes == 16
    elif way == WHOLE:
        assert num_bytes == 32_000
    else:
        assert num_bytes == 2000 + way * 6


def test_candidates_are_enough_once_a_sequence_may_end() -> None:
    """min_tokens needs whole rows only as long as it forbids something."""
    settings: dict[str, Any] = {"end_token_ids": frozenset({1}), "min_tokens": 1, "top_k": 3}
    sampler, sequences = Sampler(64), [make_sequence(0, **settings)]
    cpu = torch.device("cpu")
    assert sampler.num_candidates(sequences, 0, cpu) == WHOLE
    choose(sampler, torch.randn(1, 50), sequences)
    sequences[0].token_ids.append(5)
    assert sampler.num_candidates(sequences, 0, cpu) == 3


@pytest.mark.cuda
def test_nothing_waits_for_the_device() -> None:
    """It can be captured, and finds other candidates in other logits."""
    logits = torch.randn(5, 4096, device="cuda").bfloat16()
    rows = torch.empty_like(logits)
    (ranks,) = thread_ranks(1)

    def run() -> None:
        found = gather_candidates(logits, range(4096), 50, ranks, 4096)
        assert found is not None
        rows.copy_(found)

    graph = capture(run)
    logits.copy_(torch.randn(5, 4096))
    graph.replay()
    kept = logits >= logits.topk(50).values[:, -1:]
    assert torch.equal(rows, logits.masked_fill(~kept, -INF))


def test_few_rows_go_whole() -> None:
    most = FEW_BYTES // (128_256 * 2 // 2)
    assert quickest(20, most, 128_256, 2, 2) == WHOLE
    assert quickest(20, most + 1, 128_256, 2, 2) == 20
    assert quickest(20, most * 2 // 3, 128_256, 2, 4) == WHOLE
    assert quickest(20, most * 2 // 3 + 1, 128_256, 2, 4) == 20
    assert [quickest(kind, most + 1, 128_256, 2, 2) for kind in (LIKELIEST, WHOLE)] == [0, -1]
