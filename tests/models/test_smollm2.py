"""The default model's greedy text equals transformers' on the same GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nano_vllm.config import DEFAULT_MODEL
from nano_vllm.engine.llm import LLM
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.weights.resolve import resolve_model

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, astronauts",
    "A recipe for bread needs",
    "Le chat est",
    "The quick brown fox",
    "Photosynthesis is",
    "import numpy as np\n",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "The mitochondria",
    "Q: What is 2 + 2?\nA:",
    "Shakespeare wrote",
    "The largest ocean on Earth",
    "Gravity is the force",
    "My favourite season is",
    "Roses are red,",
]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model_path() -> Path:
    path = resolve_model(DEFAULT_MODEL)
    assert path.suffix == ".gguf", "the tests compare with transformers on the packaged GGUF file"
    return path


def test_greedy_text_of_20_prompts_equals_transformers(model_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with LLM(str(model_path), device="cpu", dtype="float32", max_model_len=512) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        tokenizer = llm.get_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.float32
    ).eval()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        completion = output.outputs[0]
        ours = completion.token_ids
        ended = ours[-1] in tokenizer.eos_token_ids
        assert ended if completion.finish_reason == "stop" else len(ours) == MAX_TOKENS
        assert not set(ours[:-1]) & set(tokenizer.eos_token_ids)
        # Greedy text repeats itself: one pass over it says the token after each of its own.
        with torch.inference_mode():
            logits = model(torch.tensor([[*output.prompt_token_ids, *ours]])).logits[0]
        expected = logits[len(output.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
        assert ours == expected, prompt
        assert completion.text == tokenizer.decode(expected)


def test_chat_knows_paris() -> None:
    with LLM(device="cpu", max_model_len=512) as llm:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert "Paris" in output[0].outputs[0].text
    assert output[0].outputs[0].finish_reason == "stop"
