"""The requests of a benchmark are those that its figures are quoted for."""

from __future__ import annotations

import argparse

import pytest

from nano_vllm.bench.workload import Workload, length_range, positive


def test_default_workload_is_that_of_the_quoted_figures() -> None:
    """256 requests, lengths uniform in 100..1024, token ids in 0..10000, seed 0."""
    workload = Workload.random(256, (100, 1024), (100, 1024), vocab_size=151_936, seed=0)
    assert (workload.input_tokens, workload.output_tokens) == (142_827, 133_966)
    lengths = [*workload.input_lens, *workload.output_lens]
    assert 100 <= min(lengths) <= max(lengths) <= 1024
    ids = [token for prompt in workload.prompts for token in prompt]
    assert (min(ids), max(ids)) == (0, 10_000)


def test_one_length_and_a_small_vocabulary() -> None:
    workload = Workload.random(50, (7, 7), (3, 3), vocab_size=20, seed=1)
    assert set(workload.input_lens) == {7}
    assert workload.output_lens == [3] * 50
    assert {token for prompt in workload.prompts for token in prompt} == set(range(20))
    assert workload.with_output_len(1).output_tokens == 50
    assert workload.with_output_len(1).prompts == workload.prompts


def test_figures() -> None:
    workload = Workload([[1, 2, 3], [4]], [10, 2])
    assert workload.figures(2.0) == {"output tok/s": 6.0, "total tok/s": 8.0, "wall s": 2.0}


def test_lengths_must_be_possible() -> None:
    for lengths in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match="input_len must be at least 1 and not fall, got"):
            Workload.random(1, lengths, (1, 1), 20, 0)
        with pytest.raises(ValueError, match="output_len must be at least 1 and not fall, got"):
            Workload.random(1, (1, 1), lengths, 20, 0)
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        Workload.random(0, (1, 1), (1, 1), 20, 0)


def test_command_line_values() -> None:
    assert length_range("64") == (64, 64)
    assert length_range("100-1024") == (100, 1024)
    assert positive("12") == 12
    for text in ("", "-3", "5-", "1-2-3", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be like 64 or 100-1024"):
            length_range(text)
    for text in ("0", "-1", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be an integer of at least 1"):
            positive(text)
