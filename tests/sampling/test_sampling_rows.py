"""Batches of any of the requests that are there read the numbers of these, whoever came before."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import pytest
import torch

from nano_vllm.sampling import sampling_rows
from nano_vllm.sampling.sampling_rows import RequestTable, SamplingRows
from nano_vllm.sampling.token_history import TokenHistory
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence

ENGINE_SEED = 2**63 + 5  # modulo 2^64 below 0


def draw_sequence(draw: random.Random, seq_id: int) -> Sequence:
    params = SamplingParams(
        temperature=draw.choice((0.0, 0.7, 1.5)),
        top_k=draw.choice((0, -1, 7, 2**40)),
        top_p=draw.choice((0.1, 1.0)),
        min_p=draw.choice((0.0, 0.2)),
        seed=draw.choice((None, 0, 3, -1, 2**63 - 1)),
        logprobs=draw.choice((None, None, 2)),
        logit_bias=draw.choice((None, {5: 1.0})),
        frequency_penalty=draw.choice((0.0, 0.0, 0.5)),
        min_tokens=draw.choice((0, 0, 3)),
        max_tokens=9,
    )
    prompt = [1] * draw.randint(1, 9)
    end = draw.choice((frozenset(), frozenset({2})))
    return Sequence(seq_id, str(seq_id), draw.randrange(3), prompt, params, end)


def expected_of(sequence: Sequence) -> dict[str, float]:
    params = sequence.params
    seed = ENGINE_SEED if params.seed is None else params.seed + sequence.index
    return {
        "temperatures": params.temperature,
        "top_k": min(max(params.top_k, 0), 2**31 - 1),
        "top_p": params.top_p,
        "min_p": params.temperature * math.log(params.min_p) if params.min_p else -math.inf,
        "seeds": (seed + 2**63) % 2**64 - 2**63,
        "streams": 0 if params.seed is not None else sequence.seq_id + 1,
        "prompt_lens": sequence.num_prompt_tokens,
    }


def is_adjusted(sequence: Sequence, lead: int) -> bool:
    params = sequence.params
    waits = bool(sequence.end_token_ids) and sequence.num_output_tokens + lead < params.min_tokens
    return bool(params.logit_bias) or params.frequency_penalty != 0.0 or waits


@pytest.mark.parametrize("spare", [0, 3, 1000])
def test_numbers_are_those_of_each_request(
    monkeypatch: pytest.MonkeyPatch, seed: int, spare: int
) -> None:
    monkeypatch.setattr(sampling_rows, "SPARE_PLACES", spare)
    draw = random.Random(seed)
    table, history = RequestTable(ENGINE_SEED), TokenHistory(64)
    alive = [draw_sequence(draw, seq_id) for seq_id in range(12)]
    for step in range(60):
        alive[draw.randrange(len(alive))] = draw_sequence(draw, 100 + step)
        for sequence in draw.sample(alive, 4):
            sequence.token_ids.append(3)
        sequences = draw.sample(alive, draw.randint(1, len(alive)))
        num_ahead = draw.randint(0, len(sequences))
        rows: Any = SamplingRows(sequences, num_ahead, table, history, torch.device("cpu"))
        for name in expected_of(sequences[0]):
            assert rows.draws[name].tolist() == [expected_of(s)[name] for s in sequences], name
        adjusted = [r for r, s in enumerate(sequences) if is_adjusted(s, r < num_ahead)]
        places = rows.draws["adjusted_rows"].tolist() if adjusted else [-1] * len(sequences)
        assert [row for row, place in enumerate(places) if place >= 0] == adjusted
        assert rows.num_adjusted == len(adjusted)
        asked = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
        assert rows.logprob_rows == asked
        assert len(table._places) <= 2 * len(sequences) + spare + len(sequences)


def test_sequences_that_ended_are_not_kept() -> None:
    table, sequence = RequestTable(0), draw_sequence(random.Random(0), 7)
    count = sys.getrefcount(sequence)
    table.draws([sequence])
    assert sys.getrefcount(sequence) == count
