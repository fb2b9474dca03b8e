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
from nano_vllm.weights.gguf_file import TENSOR_TYPES
from nano_vllm.weights.model_config import load_model_config

WriteGGUF = Callable[..., Path]
TYPES = [name for name, _, _ in TENSOR_TYPES.values()]


def open_checkpoint(path: Path) -> GGUFCheckpoint:
    return GGUFCheckpoint(path, load_model_config(path, model_class))


def encoded(kind: GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
    """Random numbers in a type, or random blocks where gguf cannot quantize."""
    rng = np.random.default_rng(kind.value)
    try:
        return gguf.quantize(rng.standard_normal(shape, dtype=np.float32), kind)
    except NotImplementedError:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        return rng.integers(0, 256, (shape[0], shape[1] // elements * size), dtype=np.uint8)


def test_every_type_that_gguf_knows() -> None:
    known = {kind for kind in GGMLQuantizationType if can_dequantize(kind)}
    assert {GGMLQuantizationType[name] for name in TYPES} == known
    for kind_id, (name, *sizes) in TENSOR_TYPES.items():
        assert GGMLQuantizationType(kind_id).name == name
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind_id)] == tuple(sizes)


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    except ValueError:
        return True  # F32 and F16, which it takes as they are
    return True


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
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
    assert checkpoint.sample("t.weight") == raw[4].tobytes()
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}  # random blocks have NaN for a scale
    torch.testing.assert_close(checkpoint.read("t.weight", torch.float32), expected, **exactly)
    half = torch.empty(9, 512, dtype=torch.bfloat16)
    checkpoint.read_into("t.weight", half)
    torch.testing.assert_close(half, expected.bfloat16(), **exactly)
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


def test_names() -> None:
    llama, gemma, phi = "LlamaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"
    assert hf_name("blk.3.ffn_gate_exps.weight", llama) == "blk.3.ffn_gate_exps.weight"
    assert hf_name("blk.12.attn_output.bias", llama) == "model.layers.12.self_attn.o_proj.bias"
    assert hf_name("output.weight", llama) == "lm_head.weight"
    assert hf_name("blk.0.ffn_norm.weight", gemma).endswith("0.pre_feedforward_layernorm.weight")
    assert hf_name("blk.0.ffn_up.weight", phi) == "model.layers.0.mlp.gate_up_proj.weight"
