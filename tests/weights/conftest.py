"""Checkpoints small enough to make in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

WriteGGUF = Callable[..., Path]

LLAMA_METADATA: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.block_count": 1,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
LLAMA_SHAPES = {
    "token_embd.weight": (50, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (96, 64),
    "blk.0.ffn_up.weight": (96, 64),
    "blk.0.ffn_down.weight": (64, 96),
    "output_norm.weight": (64,),
}


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes a small Llama as a GGUF file; metadata of None is left out."""

    def write(
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        types: dict[str, gguf.GGMLQuantizationType] | None = None,
        arch: str = "llama",
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        for key, value in {**LLAMA_METADATA, **(metadata or {})}.items():
            if key == "general.alignment":
                writer.add_custom_alignment(value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        rng = np.random.default_rng(0)
        made = {n: rng.standard_normal(s, dtype=np.float32) for n, s in LLAMA_SHAPES.items()}
        for tensor_name, array in {**made, **(tensors or {})}.items():
            writer.add_tensor(tensor_name, array, raw_dtype=(types or {}).get(tensor_name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
