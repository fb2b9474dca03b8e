"""The model's shape, from whichever form the checkpoint has."""

from __future__ import annotations

from pathlib import Path

from nano_vllm.config import ModelConfig
from nano_vllm.weights.gguf_config import parse_gguf_config
from nano_vllm.weights.gguf_file import GGUFFile
from nano_vllm.weights.hf_config import FindFamily, parse_hf_config


def load_model_config(path: Path, find_family: FindFamily) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder or a .gguf file; ValueError with the file and the
    field at fault.

    Args:
        path: the folder or the file.
        find_family: the class of an architecture; raises ValueError for one that cannot run.
    """
    if path.suffix == ".gguf":
        return parse_gguf_config(GGUFFile(path), find_family)
    return parse_hf_config(path, find_family)
