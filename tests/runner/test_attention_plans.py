"""One plan for each distinct sliding window of a model's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nano_vllm import ops
from nano_vllm.config import ModelConfig
from nano_vllm.layers.attention import AttentionMetadata
from nano_vllm.runner.input_batch import InputBatch


def config(**options: Any) -> ModelConfig:
    return ModelConfig("X", 50, 64, 96, 4, 2, 1, 64, 128, 1e-5, 1e4, **options)


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({}, [0]),
        ({"sliding_window": 12}, [12]),
        ({"sliding_window": 12, "full_attention_layers": frozenset({1, 3})}, [0, 12]),
        ({"sliding_window": 12, "full_attention_layers": frozenset(range(4))}, [0]),
    ],
)
def test_windows(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], windows: list[int]
) -> None:
    """Each goes into the workspace in which the layers of that window look for it."""
    model = config(**options)
    assert list(model.windows()) == windows
    batch = InputBatch(model, 32, 4, 8, 16, torch.device("cpu"))
    workspaces = {window: torch.empty(1) for window in model.windows()}
    monkeypatch.setattr(batch, "_workspaces", workspaces)  # as on a GPU
    planned: dict[int, torch.Tensor] = {}

    def plan(workspace: torch.Tensor, *_: Any, sliding_window: int, **__: Any) -> None:
        planned[sliding_window] = workspace

    monkeypatch.setattr(ops, "plan_attention", plan)
    none = torch.empty(0)
    batch.plan(AttentionMetadata(none, none, none, none, 1, 1, 1, workspaces))
    assert list(planned) == windows
    for layer in range(model.num_layers):
        assert planned[model.window(layer)] is workspaces[model.window(layer)]
