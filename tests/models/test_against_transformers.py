"""Logits and greedy tokens of random checkpoints equal those of transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from nano_vllm import check
from nano_vllm.config import EngineConfig
from nano_vllm.engine.llm import LLM
from nano_vllm.runner import model_worker
from nano_vllm.runner.model_runner import ModelRunner
from nano_vllm.sampling_params import SamplingParams
from tests.models.checkpoints import SETTINGS, make_checkpoint, write_gguf

BLOCK_SIZE = 8
LENGTHS = (1, 7, 8, 9, 40, 63)


def logits_of_all_positions(
    path: Path, prompts: list[list[int]], chunk: int, dtype: str = "float32", **options: Any
) -> list[torch.Tensor]:
    """Logits of every prompt position, computed in mixed batches of chunks."""
    config = EngineConfig(
        model=str(path),
        device="cpu",
        dtype=dtype,
        num_blocks=64,
        block_size=BLOCK_SIZE,
        **({"max_model_len": 256} | options),
    )
    return check.logits_of_all_positions(ModelRunner(config), prompts, chunk)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    oracle = make_checkpoint(tmp_path, **SETTINGS[name])
    draw = random.Random(name)
    prompts = [[draw.randrange(199) for _ in range(length)] for length in LENGTHS]
    ours = logits_of_all_positions(tmp_path, prompts, chunk=13)
    for prompt, logits in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


LLAMAS = ("multi-query", "multi-head, tied", "llama3 scaling")


@pytest.mark.parametrize("name", [n for n in SETTINGS if "family" in SETTINGS[n] or n in LLAMAS])
def test_64_greedy_tokens_equal_transformers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks beside decodes, the last layer for what samples alone. Each token is what
    the oracle finds most likely behind those before it, which is to say that its own greedy tokens
    are the same.
    """
    monkeypatch.setattr(model_worker, "LEAST_SKIPPED_TOKENS", 1)
    oracle = make_checkpoint(tmp_path, seed=3, **SETTINGS[name])
    draw = random.Random(name)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in (1, 9, 63)]
    with LLM(
        str(tmp_path),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        num_blocks=128,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=24,
        max_model_len=256,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + tokens])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_longrope_beyond_the_trained_context(tmp_path: Path) -> None:
    """Where longer sequences may come, all have the long factors; in transformers, those that are
    longer.
    """
    settings = SETTINGS["phi3, long"] | {"original_max_position_embeddings": 32}
    oracle = make_checkpoint(tmp_path, **settings)
    draw = random.Random(0)
    prompts = [[draw.randrange(199) for _ in range(length)] for length in (33, 40, 63)]
    ours = logits_of_all_positions(tmp_path, prompts, chunk=13)
    for prompt, logits in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Names without a prefix, and the causal mask among the tensors."""
    oracle = make_checkpoint(tmp_path, **SETTINGS["gpt2"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    (ours,) = logits_of_all_positions(tmp_path, [prompt], chunk=4)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


GGUF_NAMES = [
    "multi-head, tied",
    "biases",
    "qwen2",
    "qwen3",
    "qwen3, tied, wide",
    "gemma2, low caps",
    "gemma3",
    "phi3, part of a head rotated, sliding window",
    "phi3, long",
    "smollm3",
    "olmo2",
    "olmo2, yarn scaling",
    "olmo3",
    "olmo3, own layers, biases",
    "glm4",
    "glm4, most of a head rotated, no biases",
    "granite",
    "granite, tied",
    "gpt2",
    "gpt2, own width",
]


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_logits_of_a_gguf_file_equal_transformers(tmp_path: Path, name: str) -> None:
    oracle = make_checkpoint(tmp_path, **SETTINGS[name])
    write_gguf(oracle, tmp_path / "model.gguf")
    draw = random.Random(name)
    prompt = [draw.randrange(199) for _ in range(40)]
    (ours,) = logits_of_all_positions(tmp_path / "model.gguf", [prompt], chunk=13)
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_joined_tensors_keep_their_bits(tmp_path: Path) -> None:
    """Query, key and value of one quantized tensor."""
    oracle = make_checkpoint(tmp_path, **SETTINGS["gpt2"])
    write_gguf(oracle, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    path = tmp_path / "model.gguf"
    (plain,) = logits_of_all_positions(path, prompts, chunk=4)
    (kept,) = logits_of_all_positions(path, prompts, chunk=4, quantization="gguf")
    assert 0 < float((kept - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("name", ["grouped queries", "qwen3", "qwen3, tied, wide"])
def test_sixteen_bits_are_as_near_to_float64_as_those_of_transformers(
    tmp_path: Path, name: str
) -> None:
    """A norm of ours rounds once, that of transformers twice: the error must not be larger."""
    draw = random.Random(name)
    prompts = [[draw.randrange(199) for _ in range(60)] for _ in range(4)]
    ours = theirs = 0.0
    for seed in range(4):
        oracle = make_checkpoint(tmp_path, seed, **SETTINGS[name]).bfloat16()
        oracle.save_pretrained(tmp_path)
        mine = logits_of_all_positions(tmp_path, prompts, chunk=100, dtype="bfloat16")
        with torch.inference_mode():
            others = oracle(torch.tensor(prompts)).logits
            exact = oracle.double()(torch.tensor(prompts)).logits
        ours += float((torch.stack(mine).double() - exact).square().mean())
        theirs += float((others.double() - exact).square().mean())
    print(f"mean squares of the errors: ours {ours:.3e}, of transformers {theirs:.3e}")
    assert ours <= theirs


@pytest.mark.parametrize("name", ["grouped queries", "llama3 scaling", "qwen3"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_greedy_tokens_equal_transformers_under_preemption(
    tmp_path: Path, name: str, prefix_caching: bool
) -> None:
    oracle = make_checkpoint(tmp_path, seed=1, **SETTINGS[name])
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 199) for _ in range(draw.choice(LENGTHS))] for _ in range(12)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(
        str(tmp_path),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        num_blocks=24,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=32,
        max_model_len=128,
        enable_prefix_caching=prefix_caching,
    ) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        inputs = torch.tensor([prompt])
        expected = oracle.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert output.outputs[0].token_ids == expected.tolist()
