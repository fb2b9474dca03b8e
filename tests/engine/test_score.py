"""llm.score: log-probabilities of continuations, beside those of transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_vllm.engine.llm import LLM
from tests.engine.test_llm import make_llm
from tests.models.checkpoints import make_checkpoint


def test_equals_transformers(tmp_path: Path) -> None:
    """In chunks smaller than a prompt, and with prefixes that are cached already."""
    oracle = make_checkpoint(tmp_path, seed=9)
    draw = random.Random(9)
    contexts = [[draw.randrange(199) for _ in range(n)] for n in (1, 17, 30, 30)]
    contexts[3] = contexts[2]
    continuations = [[draw.randrange(199) for _ in range(n)] for n in (20, 1, 3, 12)]
    with torch.inference_mode():
        logits = oracle(torch.tensor([contexts[1]])).logits[0, -1]
    continuations[1] = [int(logits.argmax())]
    with LLM(
        str(tmp_path),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        num_blocks=32,
        block_size=8,
        max_num_batched_tokens=16,
    ) as llm:
        scores = llm.score(contexts, continuations, use_tqdm=False)
    for context, continuation, score in zip(contexts, continuations, scores, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([context + continuation])).logits[0]
        rows = logits[len(context) - 1 : -1].double().log_softmax(-1)
        expected = rows.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        assert score.token_ids == continuation
        assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert score.logprob == pytest.approx(float(expected.sum()), abs=1e-3)
        assert score.is_greedy == (rows.argmax(-1).tolist() == continuation)
    assert [score.is_greedy for score in scores] == [False, True, False, False]


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        (["a", "b"], ["c"], "continuations must be as many as the 2 contexts, got 1"),
        (["a"], [[98]], "pair 0: context and continuation must both be texts or both be"),
        ([[97]], [[]], "pair 0: .* at least one token each, got 1 and 0"),
        ([[]], [[97]], "pair 0: .* at least one token each, got 0 and 1"),
        ([[97], [97]], [[98], [98] * 64], "pair 1: the prompt must have at most 63 tokens"),
        ([[97]], [[-1]], "pair 0: prompt token ids must be integers in"),
    ],
)
def test_invalid(contexts: Any, continuations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm().score(contexts, continuations, use_tqdm=False)
