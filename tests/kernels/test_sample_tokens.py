"""`sample_tokens` against plain sums in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import Draw, each_dtype, random_cases

INF = math.inf


def doubles(draw: Draw, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=draw.device)


def sample(
    draw: Draw,
    logits: torch.Tensor,
    temperatures: list[float],
    floors: list[float],
    uniforms: list[float],
) -> list[int]:
    out = draw.strided(torch.full((len(logits),), -99, device=draw.device), fill=-416)
    numbers = [doubles(draw, values) for values in (temperatures, floors, uniforms)]
    before = [tensor.clone() for tensor in (logits, *numbers)]
    ops.sample_tokens(out, logits, *numbers)
    for tensor, old in zip((logits, *numbers), before, strict=True):
        assert_equal_bits(tensor, old)
    assert_gaps_untouched(out)
    return out.tolist()


def check(
    logits: torch.Tensor, temperature: float, floor: float, uniform: float, token: int
) -> None:
    """The token's part of the cumulative weights holds the number, but for rounding."""
    logits = logits.double().cpu()
    if temperature == 0:
        assert token == int((logits == logits.max()).nonzero()[0])
        return
    exponents = (logits - logits.max()) / temperature
    weights = exponents.exp().masked_fill(exponents < floor, 0)
    assert exponents[token] >= floor
    cumulative = weights.cumsum(-1) / weights.sum()
    below = cumulative[token - 1] if token else 0.0
    assert below - 1e-6 <= uniform <= cumulative[token] + 1e-6
    assert weights[token] > 0


@each_dtype
@random_cases(20)
def test_random_rows(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    num_rows = draw.choice((1, 2, 5, 40))
    vocab_size = draw.choice((1, 7, 8, 100, 1024, 1025, 8193, 50_257, 152_064))
    logits = draw.strided(
        draw.normal(num_rows, vocab_size, dtype=dtype) * draw.choice((0.1, 1.0, 5.0))
    )
    logits[:, draw.between(0, vocab_size - 1)] = 30.0 if draw.choice((True, False)) else -INF
    if vocab_size == 1:
        logits.fill_(draw.uniform(-5, 5))
    temperatures = [draw.choice((0.0, 1.0, draw.uniform(0.01, 10.0))) for _ in range(num_rows)]
    floors = [draw.choice((-INF, -draw.uniform(0.0, 8.0))) for _ in range(num_rows)]
    uniforms = [draw.choice((0.0, 1 - 2**-53, draw.uniform(0, 1))) for _ in range(num_rows)]
    together = sample(draw, logits, temperatures, floors, uniforms)
    for row in range(num_rows):
        given = temperatures[row], floors[row], uniforms[row]
        check(logits[row], *given, together[row])
        alone = sample(draw, logits[row : row + 1], *([value] for value in given))
        assert alone == [together[row]]


@each_dtype
@pytest.mark.parametrize("vocab_size", [20, 3001])
def test_each_token_has_its_share(
    device: str, dtype: torch.dtype, seed: int, vocab_size: int
) -> None:
    """Evenly spread numbers meet each token as often as its weight says."""
    draw = Draw(seed, device)
    num_rows = 20_000
    logits = draw.normal(1, vocab_size, dtype=dtype)
    tokens = sample(
        draw,
        logits.expand(num_rows, -1),
        [0.8] * num_rows,
        [-2.0] * num_rows,
        [(row + 0.5) / num_rows for row in range(num_rows)],
    )
    exponents = (logits[0].double() - logits[0].double().max()) / 0.8
    weights = exponents.exp().masked_fill(exponents < -2.0, 0).cpu()
    counts = torch.bincount(torch.tensor(tokens), minlength=vocab_size)
    assert bool((counts - weights / weights.sum() * num_rows).abs().le(1.01).all())


@each_dtype
def test_rows_that_are_not_finite(device: str, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, device)
    for vocab_size in (3, 16, 5000):
        logits = draw.normal(8, vocab_size, dtype=dtype)
        logits[1, draw.between(0, vocab_size - 1)] = torch.nan
        logits[2, draw.between(0, vocab_size - 1)] = INF
        logits[3] = -INF
        logits[4] = torch.nan
        logits[5, : vocab_size - 1] = -INF
        tokens = sample(draw, logits, [0.0, 1.0] * 4, [-INF] * 8, [0.5] * 8)
        assert tokens[1:5] == [-1] * 4
        assert tokens[5] == vocab_size - 1
        assert min(tokens[0], tokens[6], tokens[7]) >= 0


def test_a_floor_keeps_what_equals_it(device: str) -> None:
    draw = Draw(0, device)
    logits = torch.tensor([[1.1, 3.3, 3.3, 0.7, 2.2]], device=device)
    exponent = float((logits[0, 4].double() - logits[0, 1].double()) / 0.7)
    found = {sample(draw, logits, [0.7], [exponent], [step / 1000])[0] for step in range(1000)}
    assert found == {1, 2, 4}


def test_no_rows(device: str) -> None:
    assert sample(Draw(0, device), torch.empty(0, 5, device=device), [], [], []) == []
