"""Tensors of a GGUF file under their Hugging Face names, dequantized as they are read."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from nano_vllm.config import ModelConfig
from nano_vllm.quantization.gguf_blocks import FORMATS, quantized_weight
from nano_vllm.quantization.packed_weight import GROUP_SIZE, QuantizedWeight
from nano_vllm.weights.checkpoint import WHOLE, Region
from nano_vllm.weights.gguf_file import GGUFFile, GGUFTensor

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.embed_positions",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NAMES = {"ffn_norm": "pre_feedforward_layernorm"}
_OTHER_LAYER_NAMES = {
    "Gemma2ForCausalLM": _GEMMA_NAMES,
    "Gemma3ForCausalLM": _GEMMA_NAMES,
    "Phi3ForCausalLM": {"ffn_up": "mlp.gate_up_proj"},
    "Glm4ForCausalLM": {
        "post_attention_norm": "post_self_attn_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "post_ffw_norm": "post_mlp_layernorm",
    },
}
"""By architecture, where a name means something else there."""
_PERMUTED = ("LlamaForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM")
"""Architectures whose query and key rows llama.cpp's converter interleaves; the others keep the
order of their Hugging Face checkpoint, and with it the neox pairs.
"""
_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Read with the configuration."""
_PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_ELEMENTS = 1 << 18
"""Dequantized at a time: numpy's intermediates stay in the cache, twice as fast as 2M at a time."""
_MAX_THREADS = 8
"""numpy lets go of the interpreter lock only inside its loops; more threads would queue for it."""


class GGUFCheckpoint:
    """A GGUF of a supported architecture; read, not mapped, so that it never counts as resident
    memory.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        file = GGUFFile(path)
        self._path = path
        self._head_dim = config.head_dim
        self._has_permuted_rows = config.architecture in _PERMUTED
        self._norm_offset = config.norm_offset
        self._tensors = {
            hf_name(t.name, config.architecture): t
            for t in file.tensors.values()
            if t.name not in _NOT_WEIGHTS
        }
        for tensor in self._tensors.values():
            if self._is_permuted(tensor) and tensor.shape[0] % config.head_dim:
                raise ValueError(
                    f"{path}: tensor {tensor.name!r} has {tensor.shape[0]} rows, "
                    f"which heads of {config.head_dim} do not divide"
                )
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._data = os.open(path, os.O_RDONLY)
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(self.shapes[name], dtype=dtype, device="cpu")
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, destination: torch.Tensor, part: Region = WHOLE) -> None:
        tensor = self._tensors[name]
        first, end, _ = part.rows.indices(tensor.shape[0])
        rows = destination.view(end - first, -1)
        num_columns = prod(tensor.shape[1:])
        permuted = self._is_permuted(tensor)
        # The converter has added what the model adds to the weights of a Hugging Face checkpoint.
        offset = self._norm_offset if tensor.name.endswith("norm.weight") else 0.0
        unit = self._head_dim if permuted else 1
        chunk = max(1, _CHUNK_ELEMENTS // (num_columns * unit)) * unit

        @torch.inference_mode()  # of this thread; parameters may be inference tensors
        def fill(start: int) -> None:
            target = rows[start : start + chunk]
            values = self._read_rows(tensor, first + start, len(target)).view(-1, num_columns)
            if offset:
                values = values - offset
            values = unpermute(values, self._head_dim) if permuted else values
            target.copy_(values[:, part.columns])

        list(self._threads.map(fill, range(0, end - first, chunk)))

    def finish(self) -> None:
        pass

    def read_quantized(self, name: str, part: Region = WHOLE) -> QuantizedWeight | None:
        """The part as the file has it, where its type is of blocks of 32 elements."""
        tensor = self._tensors[name]
        if tensor.type_name not in FORMATS or len(tensor.shape) != 2:
            return None
        num_rows, num_columns = tensor.shape
        first, end, _ = part.rows.indices(num_rows)
        left, right, _ = part.columns.indices(num_columns)
        if left % GROUP_SIZE or right % GROUP_SIZE:
            return None
        data = np.frombuffer(self._read_bytes(tensor, first, end - first), dtype=np.uint8)
        blocks = data.reshape(end - first, num_columns // GROUP_SIZE, -1)
        weight = quantized_weight(
            blocks[:, left // GROUP_SIZE : right // GROUP_SIZE], tensor.type_name
        )
        if self._is_permuted(tensor):
            for numbers in ("quants", "scales", "minima"):
                setattr(weight, numbers, unpermute(getattr(weight, numbers), self._head_dim))
        return weight

    def sample(self, name: str) -> bytes:
        tensor = self._tensors[name]
        if len(tensor.shape) < 2:
            return bytes(self._read_bytes(tensor, 0, tensor.shape[0]))
        return bytes(self._read_bytes(tensor, tensor.shape[0] // 2, 1))

    def _read_rows(self, tensor: GGUFTensor, start: int, num_rows: int) -> torch.Tensor:
        data = self._read_bytes(tensor, start, num_rows)
        if tensor.type_name in _PLAIN_DTYPES:
            return torch.frombuffer(data, dtype=_PLAIN_DTYPES[tensor.type_name])
        # As one row: gguf otherwise works through 16 rows at a time, which is slow for narrow ones.
        blocks = np.frombuffer(data, dtype=np.uint8)[None]
        return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[tensor.type_name]))

    def _read_bytes(self, tensor: GGUFTensor, start: int, num_rows: int) -> bytearray:
        row_bytes = tensor.num_bytes // tensor.shape[0]
        size = num_rows * row_bytes
        data = bytearray(os.pread(self._data, size, tensor.offset + start * row_bytes))
        if len(data) != size:
            raise ValueError(f"{self._path} is truncated: tensor {tensor.name!r} ends early")
        return data

    def _is_permuted(self, tensor: GGUFTensor) -> bool:
        return self._has_permuted_rows and tensor.name.split(".")[-2:-1] in (["attn_q"], ["attn_k"])

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._data)


def hf_name(name: str, architecture: str) -> str:
    """The name of a tensor in a Hugging Face checkpoint that calls its modules as Llama's does, or
    its own name where it has none.
    """
    module, _, leaf = name.rpartition(".")
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{leaf}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    names = _LAYER_NAMES | _OTHER_LAYER_NAMES.get(architecture, {})
    if match is None or match[2] not in names:
        return name
    return f"model.layers.{match[1]}.{names[match[2]]}.{leaf}"


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole query or key heads in the order of the Hugging Face checkpoint.

    For llama.cpp's rotary embedding, which pairs neighbours, its converter interleaves the two
    halves of each head.
    """
    halves = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
