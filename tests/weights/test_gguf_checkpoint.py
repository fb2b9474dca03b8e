from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

from nano_vllm.models.registry import model_class
from nano_vllm.weights import gguf_checkpoint
from nano_vllm.weights.gguf_checkpoint import GGUFCheckpoint, hf_name
from nano_vllm.weights.model_config import load_model_config

WriteGGUF = Callable[..., Path]
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def open_checkpoint(path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(path, load_model_config(path, model_class))


def encoded(kind: GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
    """Random blocks of a type; scales, which are float16, stay small and finite."""
    rng = np.random.default_rng(kind.value)
    if kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K):
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (shape[0], shape[1] // elements, size), dtype=np.uint8)
        scales = rng.uniform(-0.1, 0.1, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
        if kind == GGMLQuantizationType.Q6_K:
            blocks[..., -2:] = scales[..., :2]
        else:
            blocks[..., :4] = scales
        return blocks.reshape(shape[0], -1)
    return gguf.quantize(rng.standard_normal(shape, dtype=np.float32), kind)


@pytest.mark.parametrize("chunk_elements", [1, 1000, 1 << 18])
@pytest.mark.parametrize("type_name", TYPES)
def test_dequantized_in_chunks(
    write_gguf: WriteGGUF, monkeypatch: pytest.MonkeyPatch, type_name: str, chunk_elements: int
) -> None:
    monkeypatch.setattr(gguf_checkpoint, "_CHUNK_ELEMENTS", chunk_elements)
    kind = GGMLQuantizationType[type_name]
    raw = encoded(kind, (9, 512))
    checkpoint = open_checkpoint(write_gguf(tensors={"t.weight": raw}, types={"t.weight": kind}))
    expected = torch.from_numpy(gguf.dequantize(raw, kind).copy())
    assert checkpoint.shapes["t.weight"] == (9, 512)
    assert torch.equal(checkpoint.read("t.weight", torch.float32), expected)
    half = torch.empty(9, 512, dtype=torch.bfloat16)
    checkpoint.read_into("t.weight", half)
    assert torch.equal(half, expected.bfloat16())
    checkpoint.close()


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("chunk_elements", [1, 64 * 40, 1 << 18])
def test_query_and_key_rows_come_back_in_order(
    write_gguf: WriteGGUF, monkeypatch: pytest.MonkeyPatch, chunk_elements: int
) -> None:
    monkeypatch.setattr(gguf_checkpoint, "_CHUNK_ELEMENTS", chunk_elements)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((64, 64), dtype=np.float32)
    key = rng.standard_normal((32, 64), dtype=np.float32)
    bias = rng.standard_normal(64, dtype=np.float32)
    checkpoint = open_checkpoint(
        write_gguf(
            tensors={
                "blk.0.attn_q.weight": permute(query, 4),
                "blk.0.attn_k.weight": permute(key, 2),
                "blk.0.attn_q.bias": permute(bias, 4),
            }
        )
    )
    for name, expected in (("q_proj.weight", query), ("k_proj.weight", key), ("q_proj.bias", bias)):
        tensor = checkpoint.read(f"model.layers.0.self_attn.{name}", torch.float32)
        assert np.array_equal(tensor.numpy(), expected), name
    checkpoint.close()


def test_equals_transformers(write_gguf: WriteGGUF) -> None:
    q4_1 = GGMLQuantizationType.Q4_1
    rng = np.random.default_rng(0)
    shapes = {"blk.0.attn_q.weight": (64, 64), "blk.0.ffn_down.weight": (64, 96)}
    tensors = {
        n: gguf.quantize(rng.standard_normal(s, np.float32), q4_1) for n, s in shapes.items()
    }
    tensors["output.weight"] = rng.standard_normal((50, 64), dtype=np.float32)
    metadata = {"llama.vocab_size": 50, "llama.rope.dimension_count": 16}
    path = write_gguf(metadata, tensors, dict.fromkeys(shapes, q4_1))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.shapes) == set(reference)
    for name, expected in reference.items():
        assert torch.equal(checkpoint.read(name, torch.float32), expected), name
    checkpoint.close()


def test_works_on_inference_tensors(write_gguf: WriteGGUF) -> None:
    with torch.inference_mode():
        destination = torch.zeros(50, 64)
    checkpoint = open_checkpoint(write_gguf())
    checkpoint.read_into("model.embed_tokens.weight", destination)
    assert destination.abs().sum() > 0
    checkpoint.close()


def test_heads_must_fit(write_gguf: WriteGGUF) -> None:
    path = write_gguf(tensors={"blk.0.attn_q.weight": np.zeros((60, 64), np.float32)})
    with pytest.raises(ValueError, match=r"'blk.0.attn_q.weight' has 60 rows, which heads of 16"):
        open_checkpoint(path)


def test_unknown_names_stay() -> None:
    assert hf_name("blk.3.ffn_gate_exps.weight") == "blk.3.ffn_gate_exps.weight"
    assert hf_name("blk.12.attn_output.bias") == "model.layers.12.self_attn.o_proj.bias"
    assert hf_name("output.weight") == "lm_head.weight"
