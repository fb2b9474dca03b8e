"""The model's shape, from whichever form the checkpoint has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nano_vllm.config import ModelConfig
from nano_vllm.weights.gguf_config import parse_gguf_config
from nano_vllm.weights.gguf_file import GGUFFile
from nano_vllm.weights.hf_config import parse_hf_config


def load_model_config(
    path: Path, check_architecture: Callable[[str], object] | None = None
) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder or a .gguf file; ValueError with the file and the
    field at fault.

    Args:
        path: the folder or the file.
        check_architecture: raises ValueError for an architecture that cannot run.
    """
    if path.suffix == ".gguf":
        return parse_gguf_config(GGUFFile(path))
    return parse_hf_config(path, check_architecture)
