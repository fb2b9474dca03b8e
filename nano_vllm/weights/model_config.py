"""The model's shape, from whichever form the checkpoint has."""

from __future__ import annotations

from pathlib import Path

from nano_vllm.config import ModelConfig
from nano_vllm.model_family import FindFamily
from nano_vllm.weights.gguf_config import parse_gguf_config
from nano_vllm.weights.gguf_file import GGUFFile
from nano_vllm.weights.hf_config import parse_hf_config

MAX_POSITIONS = 1 << 25
"""The angles of as many positions take gigabytes."""
SMALL_BYTES = 1 << 30
"""Models up to this size are built, and the loader says which weights are missing."""


def load_model_config(path: Path, find_family: FindFamily) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder or a .gguf file; ValueError with the file and the
    field at fault.

    Args:
        path: the folder or the file.
        find_family: the class of an architecture; raises ValueError for one that cannot run.
    """
    if path.suffix == ".gguf":
        config = parse_gguf_config(GGUFFile(path), find_family)
        source, num_bytes, bits = path, path.stat().st_size, 1
    else:
        config = parse_hf_config(path, find_family)
        source = path / "config.json"
        num_bytes = sum(f.stat().st_size for f in path.glob("*.safetensors") if f.is_file())
        bits = 16
    _check_size(config, source, num_bytes, bits)
    return config


def _check_size(config: ModelConfig, source: Path, num_bytes: int, bits: int) -> None:
    """Refuse a configuration that its weights, if there are any, cannot fill, before the model is
    built.

    Args:
        config: what the file says.
        source: the file.
        num_bytes: of the files with weights.
        bits: of a weight at the least.
    """
    if config.max_position > MAX_POSITIONS:
        raise ValueError(
            f"{source}: a model must have at most {MAX_POSITIONS} positions, "
            f"got {config.max_position}"
        )
    layer = 2 * config.hidden_size * (config.num_heads * config.head_dim + config.intermediate_size)
    least = (config.vocab_size * config.hidden_size + config.num_layers * layer) * bits // 8
    if num_bytes and least > max(num_bytes, SMALL_BYTES):
        raise ValueError(
            f"{source} describes a model of at least {least} bytes, its weights have {num_bytes}"
        )
