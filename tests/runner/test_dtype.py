"""The dtype that a model runs in."""

from __future__ import annotations

import pytest
import torch

from nano_vllm.runner.model_runner import choose_dtype


@pytest.mark.parametrize(
    ("asked", "stored", "device", "expected"),
    [
        ("auto", None, "cpu", torch.float32),
        ("auto", None, "cuda", torch.float16),
        ("auto", "bfloat16", "cuda", torch.bfloat16),
        ("auto", "bfloat16", "cpu", torch.bfloat16),
        ("float32", "bfloat16", "cuda", torch.float32),
    ],
)
def test_dtype(asked: str, stored: str | None, device: str, expected: torch.dtype) -> None:
    assert choose_dtype(asked, stored, torch.device(device)) == expected
