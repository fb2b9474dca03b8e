"""What may be a prompt's token."""

from __future__ import annotations

import enum
import random
from typing import Any

import numpy as np
import pytest

from nano_vllm._core import first_not_a_token
from nano_vllm.engine.validation import RequestLimits
from nano_vllm.sampling_params import SamplingParams

VOCAB_SIZE = 199


class Number(enum.IntEnum):
    ONE = 1


def is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < VOCAB_SIZE


NOT_TOKENS: list[Any] = [
    -1,
    VOCAB_SIZE,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    True,
    False,
    1.0,
    "1",
    b"1",
    None,
    Number.ONE,
    np.int64(1),
    [1],
    float("nan"),
]


@pytest.mark.parametrize("bad", NOT_TOKENS, ids=repr)
def test_the_first_that_is_none_is_found(bad: Any) -> None:
    draw = random.Random(repr(bad))
    for length in (1, 2, 7, 300):
        token_ids: list[Any] = [draw.randrange(VOCAB_SIZE) for _ in range(length)]
        assert first_not_a_token(token_ids, VOCAB_SIZE) == -1
        place = draw.randrange(length)
        token_ids[place] = bad
        token_ids[draw.randrange(place, length)] = bad
        assert not is_token(bad)
        assert first_not_a_token(token_ids, VOCAB_SIZE) == place
        assert first_not_a_token(tuple(token_ids), VOCAB_SIZE) == place


def test_edges() -> None:
    assert first_not_a_token([], VOCAB_SIZE) == -1
    assert first_not_a_token([0, VOCAB_SIZE - 1], VOCAB_SIZE) == -1
    assert first_not_a_token([0], 0) == 0
    with pytest.raises(TypeError, match="token_ids must be a sequence"):
        first_not_a_token(1, VOCAB_SIZE)  # type: ignore[arg-type]


def test_the_error_names_it() -> None:
    limits = RequestLimits(VOCAB_SIZE, 16, has_tokenizer=False)
    limits.check([3, 4], SamplingParams())
    with pytest.raises(ValueError, match=r"integers in \[0, 199\), got True at position 1$"):
        limits.check([3, True], SamplingParams())
