"""Which models' prompts go through `qkv_linear`, and that it gets what it is to compute with: on a
CPU, with what it stands for in its place.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from nano_vllm import LLM, SamplingParams, ops
from tests.models.checkpoints import make_checkpoint

LEAST = 10


def in_pieces(
    query: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    *where: torch.Tensor,
    **options: Any,
) -> None:
    """`qkv_linear` as a product and the kernel behind it."""
    heads = query.shape[1], key_cache.shape[2], key_cache.shape[2]
    qkv = functional.linear(input, weight, bias).view(len(input), sum(heads), -1)
    rotated, key, value = qkv.split(heads, dim=1)
    ops.rotary_reshape_and_cache(positions, rotated, key, value, key_cache, *where, **options)
    query.copy_(rotated)


def generate(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    with LLM(
        str(folder),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        num_blocks=64,
        block_size=8,
        max_model_len=128,
    ) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("family", "fuses"),
    [("Llama", True), ("Qwen2", True), ("Qwen3", True), ("Glm4", False), ("Olmo2", False)],
)
def test_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, family: str, fuses: bool
) -> None:
    make_checkpoint(tmp_path, family=family, pad_token_id=0)
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in (40, 7)]
    expected = generate(tmp_path, prompts)

    rows: list[int] = []

    def counted(query: torch.Tensor, *arguments: Any, **options: Any) -> None:
        rows.append(len(query))
        in_pieces(query, *arguments, **options)

    def pays(weight: torch.Tensor, num_rows: int, head_dim: int) -> bool:
        assert weight.shape[0] % head_dim == 0
        return num_rows >= LEAST

    monkeypatch.setattr(ops, "qkv_linear", counted)
    monkeypatch.setattr(ops, "qkv_linear_pays", pays)
    assert generate(tmp_path, prompts) == expected
    assert rows == ([47] * 2 if fuses else [])  # of two layers; decodes are few
