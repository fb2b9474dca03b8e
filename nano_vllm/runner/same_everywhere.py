"""What all ranks must have alike, in words that they compare before anything is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.weights.checkpoint import open_checkpoint

_OF_THE_HOST = ("model", "tokenizer", "record")
"""Options that name files, which may lie elsewhere."""


def facts_of(
    config: EngineConfig, path: Path, model: ModelConfig, dtype: torch.dtype
) -> dict[str, str]:
    """Versions, the model's configuration, its tensors' names, shapes and, as far as is quick to
    tell, numbers; and the options.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    samples: dict[str, str] = {}
    if config.load_format != "dummy":
        checkpoint = open_checkpoint(path, model, config.load_format)
        shapes = checkpoint.shapes
        samples = {name: hashlib.sha256(checkpoint.sample(name)).hexdigest() for name in shapes}
        checkpoint.close()
    return {
        "nano_vllm": _version(),
        "torch": torch.__version__,
        "the model's configuration": _digest(model),
        "the tensors' names and shapes": _digest(sorted(shapes.items())),
        "the hash of a row of each tensor": _digest(sorted(samples.items())),
        "dtype": str(dtype),
        **{
            f.name: repr(getattr(config, f.name))
            for f in fields(config)
            if f.name not in _OF_THE_HOST
        },
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _version() -> str:
    try:
        return version("nano_vllm")
    except PackageNotFoundError:  # run from its source
        return "not installed"
