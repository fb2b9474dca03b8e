"""`sample_tokens` against plain sums in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import Draw, each_dtype, random_cases
from tests.kernels.sampling import kept_weights, philox4x32, sample_arguments, uniform

INF = math.inf
ONES = 2**64 - 1


def sample(draw: Draw, arguments: dict[str, torch.Tensor]) -> list[int]:
    logits = arguments["logits"]
    out = draw.strided(torch.full((len(logits),), -99, device=draw.device), fill=-416)
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    ops.sample_tokens(out, **arguments)
    for name, tensor in arguments.items():
        assert_equal_bits(tensor, before[name])
    assert_gaps_untouched(out)
    return out.tolist()


def is_right(weights: torch.Tensor, number: float, token: int) -> bool:
    """The token's part of the cumulative weights holds the number, but for rounding."""
    cumulative = weights.cumsum(-1) / weights.sum()
    below = float(cumulative[token - 1]) if token else 0.0
    return bool(weights[token] > 0) and below - 1e-6 <= number <= float(cumulative[token]) + 1e-6


def check(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    number: float,
    token: int,
) -> None:
    logits = logits.float().cpu()
    if temperature == 0:
        assert token == int((logits == logits.max()).nonzero()[0])
        return
    # Weights that reach top_p to the last digit may be taken either way.
    assert any(
        is_right(kept_weights(logits, temperature, top_k, p, min_p), number, token)
        for p in ({top_p, min(top_p * (1 + 1e-6), 1.0), top_p * (1 - 1e-6)})
    )


@pytest.mark.parametrize(
    ("key", "low", "high", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES, ONES, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            0x85A308D3243F6A88,
            0x0370734413198A2E,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_reference_gives_the_known_answers_of_random123(
    key: int, low: int, high: int, words: tuple[int, int, int, int]
) -> None:
    assert philox4x32(key, low, high) == words


def test_numbers_are_those_of_the_generator(device: str, seed: int) -> None:
    """A flat row shows its number: each token has the same part of the unit interval."""
    draw = Draw(seed, device)
    vocab_size, num_rows = 2**20, 40
    logits = torch.zeros(1, vocab_size, dtype=torch.bfloat16, device=device)
    seeds = [draw.between(-(2**63), 2**63 - 1) for _ in range(num_rows)]
    streams = [draw.between(0, 2**40) for _ in range(num_rows)]
    prompt_lens = [draw.between(1, 2**30) for _ in range(num_rows)]
    positions = [draw.between(0, 2**30) for _ in range(num_rows)]
    arguments = sample_arguments(
        logits.expand(num_rows, -1),
        seeds=seeds,
        streams=streams,
        prompt_lens=prompt_lens,
        seq_lens=[p + position for p, position in zip(prompt_lens, positions, strict=True)],
    )
    expected = [
        int(uniform(*row) * vocab_size) for row in zip(seeds, positions, streams, strict=True)
    ]
    assert sample(draw, arguments) == expected


@each_dtype
@random_cases(30)
def test_random_rows(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    num_rows = draw.choice((1, 2, 5, 40))
    vocab_size = draw.choice((1, 7, 8, 100, 1024, 1025, 8193, 50_257, 152_064))
    # Flat rows need more than the likeliest tokens; of large ones a few have all the weight.
    logits = draw.strided(
        draw.normal(num_rows, vocab_size, dtype=dtype) * draw.choice((0.01, 1.0, 5.0))
    )
    if draw.choice((True, False)):
        logits = logits.round()  # with ties
    logits[:, draw.between(0, vocab_size - 1)] = 30.0 if draw.choice((True, False)) else -INF
    if draw.choice((True, False, False)):
        logits[:, draw.between(1, 30) :] = -INF
    if vocab_size == 1 or bool(logits.isinf().all()):
        logits.fill_(draw.uniform(-5, 5))

    def each(*choices: float) -> list[float]:
        return [draw.choice(choices) for _ in range(num_rows)]

    temperatures = each(0.0, 1.0, draw.uniform(0.01, 10.0))
    top_k = [int(k) for k in each(0, 0, 1, 2, draw.between(1, 1000), vocab_size - 1, vocab_size)]
    top_p = each(1.0, 1.0, 1e-9, 0.9, draw.uniform(0.01, 1.0), 1 - 1e-4)
    min_p = each(0.0, 0.0, draw.uniform(0.0, 1.0), 1.0)
    seeds = [draw.between(-(2**63), 2**63 - 1) for _ in range(num_rows)]
    arguments = sample_arguments(logits, temperatures, top_k, top_p, min_p, seeds)
    together = sample(draw, arguments)
    for row in range(num_rows):
        given = temperatures[row], top_k[row], top_p[row], min_p[row]
        check(logits[row], *given, uniform(seeds[row], 2, 0), together[row])
        alone = {name: value[row : row + 1] for name, value in arguments.items()}
        assert sample(draw, alone) == [together[row]]


@each_dtype
@pytest.mark.parametrize("settings", [{}, {"min_p": 0.2}, {"top_k": 9}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("vocab_size", [20, 3001])
def test_each_token_has_its_share(
    device: str, dtype: torch.dtype, seed: int, vocab_size: int, settings: dict[str, float]
) -> None:
    """By the chi-square of many draws."""
    draw = Draw(seed, device)
    num_rows = 20_000
    logits = draw.normal(1, vocab_size, dtype=dtype)
    seeds = [draw.between(-(2**63), 2**63 - 1) for _ in range(num_rows)]
    arguments = sample_arguments(
        logits.expand(num_rows, -1),
        temperatures=0.8,
        seeds=seeds,
        **settings,  # type: ignore[arg-type]
    )
    filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    weights = kept_weights(logits[0].float().cpu(), 0.8, **filters)  # type: ignore[arg-type]
    expected = weights / weights.sum() * num_rows
    counts = torch.bincount(torch.tensor(sample(draw, arguments)), minlength=vocab_size)
    assert not counts[expected == 0].any()
    # Of the likeliest ones, and of all others together
    order = expected.argsort(descending=True)[:20]
    observed = torch.cat((counts[order], num_rows - counts[order].sum().unsqueeze(0))).double()
    wanted = torch.cat((expected[order], num_rows - expected[order].sum().unsqueeze(0)))
    possible = wanted > 1
    statistic = ((observed - wanted)[possible] ** 2 / wanted[possible]).sum()
    freedom = max(int(possible.sum()) - 1, 1)
    # Wilson and Hilferty's approximation of the chi-square quantile at 1 - 1e-6
    spread = 2 / (9 * freedom)
    assert statistic <= freedom * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


@each_dtype
def test_rows_that_are_not_finite(device: str, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, device)
    for vocab_size in (3, 16, 5000):
        for filters in ({}, {"top_p": 0.9}, {"top_k": 2}):
            logits = draw.normal(8, vocab_size, dtype=dtype)
            logits[1, draw.between(0, vocab_size - 1)] = torch.nan
            logits[2, draw.between(0, vocab_size - 1)] = INF
            logits[3] = -INF
            logits[4] = torch.nan
            logits[5, : vocab_size - 1] = -INF
            arguments = sample_arguments(logits, [0.0, 1.0] * 4, **filters)  # type: ignore[arg-type]
            tokens = sample(draw, arguments)
            assert tokens[1:5] == [-1, -1, -2, -1]
            assert tokens[5] == vocab_size - 1
            assert min(tokens[0], tokens[6], tokens[7]) >= 0


def test_min_p_keeps_what_equals_it(device: str) -> None:
    draw = Draw(0, device)
    logits = torch.tensor([[1.1, 3.3, 3.3, 0.7, 2.2]], device=device)
    arguments = sample_arguments(logits.expand(1000, -1), 0.7)
    arguments["min_p"][:] = logits[0, 4].double() - logits[0, 1].double()
    assert set(sample(draw, arguments)) == {1, 2, 4}


@each_dtype
def test_zeros_of_both_signs_are_equal(device: str, dtype: torch.dtype) -> None:
    draw = Draw(0, device)
    logits = torch.tensor([[-1.0, 0.0, -0.0, -2.0]], dtype=dtype, device=device)
    for filters in ({"top_k": 1}, {"top_p": 0.1}):
        arguments = sample_arguments(logits.expand(100, -1), **filters)  # type: ignore[arg-type]
        assert set(sample(draw, arguments)) == {1, 2}


@each_dtype
def test_adjusted_rows_stand_for_others(device: str, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, device)
    for vocab_size in (9, 1000, 4001):
        logits = draw.strided(draw.normal(6, vocab_size, dtype=dtype))
        adjusted = draw.strided(draw.normal(3, vocab_size, dtype=torch.float32))
        rows = [-1, 2, -1, 0, 1, -1]
        given = {"temperatures": 0.9, "top_p": [1.0, 0.9] * 3}
        arguments = sample_arguments(logits, **given)  # type: ignore[arg-type]
        arguments |= {
            "adjusted": adjusted,
            "adjusted_rows": torch.tensor(rows, dtype=torch.int32, device=device),
        }
        expected = sample(draw, sample_arguments(logits, **given))  # type: ignore[arg-type]
        for row, other in enumerate(rows):
            if other >= 0:
                one = sample_arguments(
                    adjusted[other : other + 1],
                    0.9,
                    top_p=given["top_p"][row],
                    seeds=[row],  # type: ignore[index]
                )
                expected[row] = sample(draw, one)[0]
        assert sample(draw, arguments) == expected


def test_no_rows(device: str) -> None:
    assert sample(Draw(0, device), sample_arguments(torch.empty(0, 5, device=device))) == []
