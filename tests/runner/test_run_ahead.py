"""Steps launched before the tokens of the one before are known give the same tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nano_vllm import LLM, SamplingParams
from nano_vllm.batch import Batch
from nano_vllm.runner.model_runner import ModelRunner
from tests.models.checkpoints import make_checkpoint

VOCAB_SIZE = 199


def draw_params(draw: random.Random, number: int) -> SamplingParams:
    return SamplingParams(
        temperature=draw.choice((0.0, 0.7, 1.5)),
        top_p=draw.choice((1.0, 0.9)),
        top_k=draw.choice((0, 0, 20)),
        min_p=draw.choice((0.0, 0.0, 0.05)),
        seed=draw.choice((None, number)),
        n=draw.choice((1, 1, 3)),
        max_tokens=draw.randint(1, 40),
        # Some end by chance, in the middle of what runs ahead.
        stop_token_ids=draw.sample(range(3, VOCAB_SIZE), draw.choice((0, 20))) or None,
        presence_penalty=draw.choice((0.0, 0.0, 0.5)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
        logit_bias=draw.choice((None, None, {7: 2.0})),
        min_tokens=draw.choice((0, 0, 1)),
        logprobs=draw.choice((None, None, 1)),
    )


@pytest.mark.parametrize("round", range(3))
def test_tokens_are_the_same(
    tmp_path: Path, device: str, seed: int, round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU too, where the engine itself would gain nothing."""
    make_checkpoint(tmp_path)
    draw = random.Random(seed + round)
    lengths = [draw.randint(1, 30) for _ in range(9)]
    prompts = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    params = [draw_params(draw, number) for number in range(len(prompts))]
    max_num_seqs = draw.choice((4, 30))
    leads: list[int] = []
    launch = ModelRunner.launch

    def counted(runner: ModelRunner, batch: Batch) -> object:
        leads.append(batch.lead)
        return launch(runner, batch)

    monkeypatch.setattr(ModelRunner, "launch", counted)
    monkeypatch.setattr(ModelRunner, "runs_ahead", True)

    def generate(async_scheduling: bool) -> list[list[list[int]]]:
        leads.clear()
        with LLM(
            str(tmp_path),
            device=device,
            dtype="float32",
            skip_tokenizer_init=True,
            max_num_seqs=max_num_seqs,
            num_blocks=60,
            block_size=8,
            max_model_len=80,
            async_scheduling=async_scheduling,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm.get_metrics().num_free_blocks == 60
        return [[c.token_ids for c in output.outputs] for output in outputs]

    ahead = generate(True)
    assert sum(leads) > 5
    assert ahead == generate(False)
    assert not any(leads)
