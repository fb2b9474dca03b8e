"""`adjust_logits` against its definition, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nano_vllm import ops
from tests.kernels.compare import assert_equal_bits, assert_gaps_untouched
from tests.kernels.draw import Draw, each_dtype, random_cases
from tests.kernels.sampling import adjust_arguments

INF = math.inf


def adjusted(draw: Draw, arguments: dict[str, torch.Tensor], said: list[list[int]]) -> torch.Tensor:
    """The op's output, once all else is as it should be."""
    out = draw.output(len(said), arguments["logits"].shape[1], dtype=torch.float32)
    expected = {name: tensor.clone() for name, tensor in arguments.items()}
    for slot, tokens in zip(arguments["slots"].tolist(), said, strict=True):
        if slot >= 0:
            expected["token_ids"][slot, len(tokens) - 1] = tokens[-1]
    ops.adjust_logits(out, **arguments)
    for name, tensor in arguments.items():
        assert_equal_bits(tensor, expected[name])
    assert_gaps_untouched(out)
    return out.cpu()


def reference(logits: torch.Tensor, said: list[int], prompt_len: int, **given: Any) -> torch.Tensor:
    out = logits.double().cpu()
    output = said[prompt_len:]
    for token in set(said):
        out[token] *= 1 / given["repetition"] if out[token] > 0 else given["repetition"]
    for token in output:
        out[token] -= given["frequency"]
    for token in set(output):
        out[token] -= given["presence"]
    for token, value in given["bias"].items():
        out[token] += value
    if given["allowed"]:
        banned = torch.ones(len(out), dtype=torch.bool)
        banned[list(given["allowed"])] = False
        out[banned] = -INF
    if len(output) < given["min_tokens"]:
        out[given["ends"]] = -INF
    for *head, last in given["bad_words"]:
        if len(head) <= len(output) and said[len(said) - len(head) :] == head:
            out[last] = -INF
    return out


def named(given: dict[str, Any], said: list[int], vocab_size: int) -> torch.Tensor:
    """The tokens that something speaks of."""
    tokens = {*said, *given["bias"], *given["ends"], *(word[-1] for word in given["bad_words"])}
    is_named = torch.full((vocab_size,), bool(given["allowed"]))
    is_named[list(tokens)] = True
    return is_named


@each_dtype
@random_cases(30)
def test_random_rows(device: str, dtype: torch.dtype, seed: int, case: int) -> None:
    draw = Draw(seed, device)
    num_rows, num_logits_rows = draw.between(1, 7), draw.between(7, 9)
    vocab_size = draw.choice((3, 31, 64, 1000, 40_001))
    logits = draw.strided(draw.normal(num_logits_rows, vocab_size, dtype=dtype) * 3)
    rows = draw.sample(num_logits_rows, num_rows)

    def tokens(low: int, high: int, least: int = 0) -> list[int]:
        pool = min(vocab_size, draw.choice((3, 50, vocab_size)))
        return [draw.between(0, pool - 1) for _ in range(draw.between(low, high))] or [0] * least

    said = [tokens(1, draw.choice((5, 3000))) for _ in range(num_rows)]
    prompt_lens = [draw.between(1, len(each)) for each in said]

    def words(row: int) -> list[list[int]]:
        found = [tokens(1, 3) for _ in range(draw.between(0, 4))]
        length = draw.between(0, 4)  # one that is about to be completed, if it is all output
        return [*found, [*said[row][len(said[row]) - length :], draw.between(0, vocab_size - 1)]]

    given = [
        {
            "repetition": draw.choice((1.0, 1.0, 1.3, 0.7)),
            "frequency": draw.choice((0.0, 0.0, 0.4, -1.1)),
            "presence": draw.choice((0.0, 0.0, 0.5, -2.0)),
            "bias": {token: draw.uniform(-9, 9) for token in set(tokens(0, 20))},
            "allowed": draw.choice(([], [], sorted(set(tokens(1, 50))))),
            "ends": sorted(set(tokens(0, 3))),
            "min_tokens": draw.choice((0, 3, 5000)),
            "bad_words": words(row),
        }
        for row in range(num_rows)
    ]
    each = {name: [row[name] for row in given] for name in given[0]}
    arguments = adjust_arguments(
        logits,
        said,
        prompt_lens,
        rows,
        max_len=3000,
        **each,  # type: ignore[arg-type]
    )
    out = adjusted(draw, arguments, said)
    for row, ours in enumerate(out):
        expected = reference(logits[rows[row]], said[row], prompt_lens[row], **given[row])
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-3)
        others = ~named(given[row], said[row], vocab_size)
        assert_equal_bits(ours[others], logits[rows[row]].float().cpu()[others])


@each_dtype
def test_without_a_slot_nothing_is_looked_back_on(device: str, dtype: torch.dtype) -> None:
    draw = Draw(0, device)
    logits = draw.normal(2, 40, dtype=dtype)
    said = [[3, 3], [4, 4]]
    arguments = adjust_arguments(
        logits, said, [1, 1], slots=[-1, 0], presence=[9.0, 9.0], bias=[{7: 1.0}, {}]
    )
    out = adjusted(draw, arguments, said)
    expected = logits.float().cpu()
    expected[0, 7] += 1
    expected[1, 4] -= 9
    assert torch.equal(out, expected)


@each_dtype
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_rows_that_are_not_finite_become_nan(device: str, dtype: torch.dtype, value: float) -> None:
    draw = Draw(0, device)
    logits = draw.normal(3, 2000, dtype=dtype)
    if value == -INF:
        logits[1] = value
    else:
        logits[1, 1999] = value
    said = [[1]] * 3
    arguments = adjust_arguments(logits, said, [1] * 3, allowed=[[5]] * 3)
    out = adjusted(draw, arguments, said)
    assert out[1].isnan().all()
    for row in (0, 2):
        assert out[row].isfinite().nonzero().flatten().tolist() == [5]


def test_no_rows(device: str) -> None:
    logits = torch.zeros(2, 5, device=device)
    assert adjusted(Draw(0, device), adjust_arguments(logits, [], []), []).shape == (0, 5)
