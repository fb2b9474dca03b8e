from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from nano_vllm import ops
from nano_vllm.logprob import Logprob
from nano_vllm.sampling.logprobs import ROWS_AT_ONCE, logprob_entries, logprob_table
from nano_vllm.sampling.sampler import Sampler, describe
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence

INF = math.inf


def make_sequence(
    seq_id: int = 0,
    index: int = 0,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    end_token_ids: frozenset[int] = frozenset(),
    bad_words: tuple[tuple[int, ...], ...] = (),
    **params: Any,
) -> Sequence:
    sequence = Sequence(
        seq_id,
        "r",
        index,
        prompt or [0],
        SamplingParams(**params),
        end_token_ids,
        bad_words,
    )
    sequence.token_ids += output or []
    return sequence


def choose(
    sampler: Sampler,
    logits: torch.Tensor,
    sequences: list[Sequence],
    new_tokens: list[int] | None = None,
) -> torch.Tensor:
    """With a token each that the sequences do not know yet, if any are given."""
    new = new_tokens or [sequence.token_ids[-1] for sequence in sequences]
    lead = 0 if new_tokens is None else 1
    lens = [sequence.num_tokens + lead for sequence in sequences]
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=logits.device)
    return sampler.choose(
        logits, sequences, seq_lens, torch.tensor(new, device=logits.device), lead
    )


def draw_and_describe(
    logits: torch.Tensor, sequences: list[Sequence], seed: int = 0
) -> tuple[list[int], dict[int, dict[int, Logprob]], dict[int, str]]:
    """Tokens, log-probabilities, failures."""
    sampler = Sampler(64, seed)
    token_ids = choose(sampler, logits, sequences)
    logprobs = sampler.logprobs(logits, token_ids, sequences)
    table = None if logprobs is None else logprobs.tolist()
    return token_ids.tolist(), *describe(token_ids.tolist(), table, sequences)


def sample(logits: torch.Tensor, sequences: list[Sequence], seed: int = 0) -> list[int]:
    tokens, _, failures = draw_and_describe(logits, sequences, seed)
    assert not failures
    return tokens


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What top-k, top-p and min-p leave of the softmax, written down plainly, in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled = np.where(scaled < np.sort(scaled)[-params.top_k], -INF, scaled)
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p)
        before = np.concatenate(([0], np.cumsum(p[order])[:-1]))
        least = p[order][before < params.top_p].min()
        p = np.where(p < least, 0, p)
        p /= p.sum()
    p = np.where(p < params.min_p * p.max(), 0, p)
    return p / p.sum()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.05, "temperature": 1.5},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    num_draws, vocab_size = 20_000, 20
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 1.5
    params = SamplingParams(**settings)
    expected = distribution(logits.numpy(), params) * num_draws
    sequences = [make_sequence(seq_id, **settings) for seq_id in range(num_draws)]
    counts = np.bincount(sample(logits.repeat(num_draws, 1), sequences), minlength=vocab_size)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # Wilson and Hilferty's approximation of the chi-square quantile at 1 - 1e-5
    spread = 2 / (9 * max(freedom, 1))
    assert statistic <= freedom * (1 - spread + 4.26 * math.sqrt(spread)) ** 3


def test_each_row_has_its_own_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 50, generator=generator)
    sequences = [
        make_sequence(row, **(SETTINGS[row % len(SETTINGS)] if row % 3 else {"temperature": 0.0}))
        for row in range(200)
    ]
    together = sample(logits, sequences)
    alone = [sample(logits[row : row + 1], [sequences[row]])[0] for row in range(200)]
    assert together == alone
    for row, token in enumerate(together):
        if sequences[row].params.greedy:
            assert token == logits[row].argmax()


def test_a_seeded_draw_depends_on_seed_index_and_position_alone() -> None:
    logits = torch.zeros(1, 1000)

    def draw(engine_seed: int = 0, **settings: Any) -> int:
        return sample(logits, [make_sequence(**settings)], engine_seed)[0]

    base = draw(seed=5)
    assert draw(seed=5, seq_id=77, engine_seed=9, prompt=[1, 2, 3]) == base
    assert draw(seed=4, index=1) == base
    assert len({base, draw(seed=6), draw(seed=5, output=[1])}) == 3
    assert draw(seed=-5) != base


def test_an_unseeded_draw_depends_on_engine_seed_sequence_and_position() -> None:
    logits = torch.zeros(1, 100_000)

    def draw(engine_seed: int = 0, **settings: Any) -> int:
        return sample(logits, [make_sequence(**settings)], engine_seed)[0]

    assert draw() == draw(prompt=[1, 2])
    assert len({draw(), draw(engine_seed=1), draw(seq_id=1), draw(output=[3]), draw(seed=0)}) == 5


def test_filters_that_are_off_change_nothing() -> None:
    logits = torch.randn(40, 30)
    plain = [make_sequence(row) for row in range(40)]
    for off in ({"top_p": 1.0}, {"top_k": 0}, {"top_k": -1}, {"top_k": 30}, {"min_p": 0.0}):
        assert sample(logits, [make_sequence(row, **off) for row in range(40)]) == sample(
            logits, plain
        )


def test_ties_stay_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]])
    for settings in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        drawn = {sample(logits, [make_sequence(seq_id, **settings)])[0] for seq_id in range(100)}
        assert drawn == {1, 2, 3}


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.999]])
    for seq_id in range(50):
        assert sample(logits, [make_sequence(seq_id, temperature=1e-300)]) == [1]
    hot = {sample(logits, [make_sequence(s, temperature=100.0)])[0] for s in range(50)}
    assert hot == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_not_changed(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 10).to(dtype)
    before = logits.clone()
    sample(
        logits,
        [
            make_sequence(0, output=[1, 2], repetition_penalty=2.0, presence_penalty=1.0),
            make_sequence(1, logit_bias={3: 5.0}, allowed_token_ids=[3, 4], top_k=2),
            make_sequence(2, temperature=0.0, logprobs=2),
        ],
    )
    assert torch.equal(logits, before)


def greedy(logits: list[float], **settings: Any) -> int:
    return sample(torch.tensor([logits]), [make_sequence(temperature=0.0, **settings)])[0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert greedy([4.0, 3.0, 0.0], prompt=[0], repetition_penalty=1.3) == 0
    assert greedy([4.0, 3.0, 0.0], prompt=[0], repetition_penalty=1.4) == 1
    assert greedy([-1.0, -1.5, -9.0], prompt=[2], output=[0, 0], repetition_penalty=2.0) == 1
    assert greedy([-1.0, -2.5, -9.0], prompt=[2], output=[0, 0], repetition_penalty=2.0) == 0


def test_frequency_penalty_counts_the_output_alone() -> None:
    assert greedy([3.0, 1.5], prompt=[0, 0, 0], frequency_penalty=1.0) == 0
    assert greedy([3.0, 1.5], output=[0], frequency_penalty=1.0) == 0
    assert greedy([3.0, 1.5], output=[0, 0], frequency_penalty=1.0) == 1
    assert greedy([1.0, 1.5], output=[0], frequency_penalty=-1.0) == 0


def test_presence_penalty_counts_once() -> None:
    assert greedy([3.0, 1.5], output=[0, 0, 0], presence_penalty=1.0) == 0
    assert greedy([3.0, 2.5], output=[0, 0, 0], presence_penalty=1.0) == 1


def test_penalties_come_before_the_bias() -> None:
    # (1 + 2) / 2 would be less than 2.2
    assert greedy([1.0, 2.2], prompt=[0], repetition_penalty=2.0, logit_bias={0: 2.0}) == 0


def test_logit_bias_and_allowed_tokens() -> None:
    assert greedy([1.0, 2.0, 3.0], logit_bias={0: 2.5}) == 0
    assert greedy([1.0, 2.0, 3.0], allowed_token_ids=[0, 1]) == 1
    assert greedy([1.0, 2.0, 3.0], allowed_token_ids=[0, 1], logit_bias={0: 9.0, 2: 9.0}) == 0


def test_bad_words() -> None:
    words = ((2,), (1, 0))
    assert greedy([2.0, 1.0, 3.0], bad_words=words) == 0
    assert greedy([2.0, 1.0, 3.0], output=[1], bad_words=words) == 1
    assert greedy([2.0, 1.0, 3.0], output=[1, 1], bad_words=words) == 1
    assert greedy([2.0, 1.0, 3.0], output=[1, 0], bad_words=words) == 0
    # Its beginning is the prompt's, not ours.
    assert greedy([2.0, 1.0, 3.0], prompt=[1], bad_words=words) == 0


def test_min_tokens_rule_out_every_end() -> None:
    settings: dict[str, Any] = {"end_token_ids": frozenset({1, 2}), "min_tokens": 2}
    assert greedy([1.0, 2.0, 3.0], **settings) == 0
    assert greedy([1.0, 2.0, 3.0], output=[0], **settings) == 0
    assert greedy([1.0, 2.0, 3.0], output=[0, 0], **settings) == 2


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_row_that_is_not_finite_fails_alone(value: float) -> None:
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.5}, {"logprobs": 1}):
        logits = torch.tensor([[1.0, 2.0], [0.0, value], [3.0, 1.0], [value, value]])
        sequences = [make_sequence(row, logprobs=1, temperature=0.0) for row in range(3)]
        sequences.insert(1, make_sequence(9, **settings))
        sequences[3] = make_sequence(8, **settings)
        tokens, logprobs, failures = draw_and_describe(logits, sequences)
        rows = [3] if value == -INF else [1, 3]
        assert failures == dict.fromkeys(rows, "the model's logits are not finite")
        assert (tokens[0], tokens[2]) == (1, 0)
        assert 0 in logprobs
        assert not logprobs.keys() & set(rows)


def test_a_row_without_an_allowed_token_fails_alone() -> None:
    for temperature in (0.0, 1.0):
        settings: dict[str, Any] = {"temperature": temperature, "min_tokens": 3, "max_tokens": 9}
        closed = make_sequence(0, end_token_ids=frozenset({1}), allowed_token_ids=[1], **settings)
        tokens, _, failures = draw_and_describe(
            torch.zeros(2, 3), [closed, make_sequence(1, top_k=1)]
        )
        assert list(failures) == [0]
        assert failures[0].startswith("no token is left")
        assert 0 <= tokens[1] < 3


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(ROWS_AT_ONCE + 5, 50)
    sequences = [
        make_sequence(row, temperature=0.3, top_k=4, logit_bias={7: 3.0}, logprobs=row % 4)
        for row in range(len(logits))
    ]
    tokens, logprobs, _ = draw_and_describe(logits, sequences)
    expected = logits.double().log_softmax(-1)
    for row, token in enumerate(tokens):
        assert next(iter(logprobs[row])) == token
        order = expected[row].argsort(descending=True).tolist()
        assert set(logprobs[row]) == {token, *order[: row % 4]}
        for token_id, entry in logprobs[row].items():
            assert entry.rank == order.index(token_id) + 1
            assert entry.logprob == pytest.approx(expected[row, token_id].item(), abs=1e-12)


def test_only_rows_that_ask_get_logprobs() -> None:
    tokens, logprobs, _ = draw_and_describe(
        torch.randn(2, 5), [make_sequence(0), make_sequence(1, logprobs=0)]
    )
    assert {row: list(entry) for row, entry in logprobs.items()} == {1: [tokens[1]]}


def test_entries_of_prompt_tokens() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 5.0]], dtype=torch.bfloat16)
    table = logprob_table(logits, torch.tensor([0, 2]), 2)
    first, second = logprob_entries(table.tolist(), [0, 2], [2, 2])
    assert {t: e.rank for t, e in first.items()} == {0: 3, 1: 1, 2: 1}
    assert next(iter(second)) == 2
    assert second[2].logprob == pytest.approx(-math.log(1 + 2 * math.exp(-5)), abs=1e-12)


def test_a_greedy_batch_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("more than a draw")

    monkeypatch.setattr(ops, "adjust_logits", forbidden)
    logits = torch.randn(4, 10)
    sequences = [make_sequence(row, temperature=0.0) for row in range(4)]
    assert sample(logits, sequences) == logits.argmax(-1).tolist()


def test_steps_one_after_the_other_equal_single_ones() -> None:
    """What a sampler keeps from step to step: rows of the same sequences, the tokens they said, and
    until when min_tokens forbids an end; where the newest token is known to the device alone, too.
    """
    generator = torch.Generator().manual_seed(0)
    settings: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.5, "top_k": 4},
        {"presence_penalty": 2.0, "frequency_penalty": 0.5, "temperature": 0.0},
        {"min_tokens": 3, "end_token_ids": frozenset({0, 1, 2, 3, 4})},
        {"bad_words": ((1, 2), (3,), (4, 4))},
        {"logit_bias": {5: 2.0}, "min_tokens": 6, "end_token_ids": frozenset({6, 7})},
    ]
    for ahead in (False, True):
        sequences = [
            make_sequence(row, prompt=[1, 2, 3], max_tokens=60, **settings[row % 6])
            for row in range(12)
        ]
        sampler = Sampler(64)
        unknown: dict[int, int] = {}
        for step in range(20):
            # Some sequences end, some come again after a while, in another order.
            rows = list(range(12)) if step % 5 < 4 else list(range(11, 0, -2))
            if step % 5 in (0, 4):
                for row, token in unknown.items():
                    sequences[row].token_ids.append(token)
                unknown = {}
            logits = torch.randn(len(rows), 9, generator=generator)
            batch = [sequences[row] for row in rows]
            new = [unknown[row] for row in rows] if unknown else None
            tokens = choose(sampler, logits, batch, new).tolist()
            for row, token in unknown.items():
                sequences[row].token_ids.append(token)
            assert tokens == sample(logits, batch)
            unknown = dict(zip(rows, tokens, strict=True))
            if not ahead:
                for row, token in unknown.items():
                    sequences[row].token_ids.append(token)
                unknown = {}


@pytest.mark.cuda
def test_both_devices_draw_alike() -> None:
    logits = torch.randn(100, 5000, generator=torch.Generator().manual_seed(0)).half()
    sequences = [
        make_sequence(
            row,
            prompt=[1, 2],
            output=[3, 3],
            logprobs=row % 3 or None,
            **(SETTINGS[row % len(SETTINGS)] if row % 5 else {"temperature": 0.0}),
            **({"repetition_penalty": 1.2, "frequency_penalty": 0.3} if row % 2 else {}),
            **({"logit_bias": {7: 3.0}, "allowed_token_ids": [5, 7, 9]} if row % 7 == 0 else {}),
        )
        for row in range(100)
    ]
    logits[50, 0] = math.nan
    tokens, logprobs, failures = draw_and_describe(logits.cuda(), sequences)
    expected, expected_logprobs, expected_failures = draw_and_describe(logits, sequences)
    assert failures == expected_failures
    assert tokens == expected
    assert {row: entry.keys() for row, entry in logprobs.items()} == {
        row: entry.keys() for row, entry in expected_logprobs.items()
    }
