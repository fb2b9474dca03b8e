"""The last layer makes nothing but keys and values of tokens that don't sample."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_vllm import LLM, RequestOutput, SamplingParams
from nano_vllm.models.decoder import GatedMLP
from nano_vllm.runner import model_worker
from tests.models.checkpoints import make_checkpoint

NUM_LAYERS = 3
LEAST = 64
PROMPT_LENS = (90, 7, 33)


@pytest.fixture
def rows_of_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each product, in the order of the layers."""
    rows: list[int] = []
    forward = GatedMLP.forward

    def counted(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return forward(mlp, x)

    monkeypatch.setattr(GatedMLP, "forward", counted)
    monkeypatch.setattr(model_worker, "LEAST_SKIPPED_TOKENS", LEAST)  # the prompts are short
    return rows


def generate(
    folder: Path,
    prompts: list[list[int]],
    max_num_batched_tokens: int = 256,
    device: str = "cpu",
    **params: Any,
) -> list[RequestOutput]:
    with LLM(
        str(folder),
        device=device,
        dtype="float32",
        skip_tokenizer_init=True,
        num_blocks=64,
        block_size=8,
        max_model_len=128,
        max_num_batched_tokens=max_num_batched_tokens,
    ) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **params)
        return llm.generate(prompts, greedy, use_tqdm=False)


def draw_prompts(folder: Path, seed: int) -> list[list[int]]:
    make_checkpoint(folder, num_hidden_layers=NUM_LAYERS)
    draw = random.Random(seed)
    return [[draw.randrange(3, 199) for _ in range(length)] for length in PROMPT_LENS]


def test_rows_of_prompts(tmp_path: Path, seed: int, rows_of_layers: list[int]) -> None:
    """One of each in the last layer, and from there on one of each in all."""
    generate(tmp_path, draw_prompts(tmp_path, seed))
    first, others = rows_of_layers[:NUM_LAYERS], rows_of_layers[NUM_LAYERS:]
    assert first == [sum(PROMPT_LENS)] * (NUM_LAYERS - 1) + [len(PROMPT_LENS)]
    assert set(others) == {len(PROMPT_LENS)}


def test_rows_of_prompts_with_logprobs(
    tmp_path: Path, seed: int, rows_of_layers: list[int]
) -> None:
    """All of them are asked for; tokens and their scores are the same."""
    prompts = draw_prompts(tmp_path, seed)
    expected = generate(tmp_path, prompts, logprobs=1)
    rows_of_layers.clear()
    outputs = generate(tmp_path, prompts, logprobs=1, prompt_logprobs=1)
    assert rows_of_layers[:NUM_LAYERS] == [sum(PROMPT_LENS)] * NUM_LAYERS
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert output.outputs[0].cumulative_logprob == pytest.approx(
            wanted.outputs[0].cumulative_logprob, abs=1e-4
        )


def test_little_is_not_worth_it(tmp_path: Path, seed: int, rows_of_layers: list[int]) -> None:
    prompt = draw_prompts(tmp_path, seed)[0]
    for length, last in ((LEAST, LEAST), (LEAST + 1, 1)):
        rows_of_layers.clear()
        generate(tmp_path, [prompt[:length]])
        assert rows_of_layers[:NUM_LAYERS] == [length] * (NUM_LAYERS - 1) + [last]


@pytest.mark.parametrize("budget", [20, 41, 130])
def test_chunks_and_streams_beside_each_other(
    tmp_path: Path, device: str, seed: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens do not depend on what is left out, nor on how prompts are cut."""
    prompts = draw_prompts(tmp_path, seed)
    monkeypatch.setattr(model_worker, "LEAST_SKIPPED_TOKENS", 1000)
    expected = generate(tmp_path, prompts, device=device)
    monkeypatch.setattr(model_worker, "LEAST_SKIPPED_TOKENS", 1)
    outputs = generate(tmp_path, prompts, budget, device)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
