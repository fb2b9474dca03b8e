"""Linear layers that keep the weights of a GGUF file as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import quantize

from nano_vllm.config import EngineConfig
from nano_vllm.layers.linear import Linear
from nano_vllm.runner.model_runner import ModelRunner
from tests.weights.conftest import LLAMA_SHAPES

WriteGGUF = Callable[..., Path]
TYPES = {"attn_q": "Q4_1", "attn_k": "Q8_0", "attn_v": "Q4_0", "ffn_gate": "Q4_0"}
"""Of some matrices; Q5_1 for the others."""


@pytest.fixture
def path(write_gguf: WriteGGUF) -> Path:
    torch.manual_seed(0)
    tensors, types = {}, {}
    for name, shape in LLAMA_SHAPES.items():
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType[TYPES.get(name.split(".")[-2], "Q5_1")]
            tensors[name] = quantize(torch.randn(shape).numpy(), kind)
            types[name] = kind
    return write_gguf(tensors=tensors, types=types)


def runner(path: Path, **options: str) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(path), device="cpu", num_blocks=16, **options))


def test_products_are_those_of_the_dequantized_weights(path: Path) -> None:
    """Up to the rounding of the input, for each layer of the model."""
    kept, plain = runner(path, quantization="gguf"), runner(path)
    linears = [(n, m) for n, m in kept.model.named_modules() if isinstance(m, Linear)]
    assert len(linears) == 5
    for name, linear in linears:
        assert linear.packed is not None, name
        x = torch.randn(3, linear.weight.shape[1])
        expected = plain.model.get_submodule(name)(x)
        error = (linear(x) - expected).norm() / expected.norm()
        assert 0 < float(error) < 0.02, name


def test_embeddings_are_dequantized(path: Path) -> None:
    kept, plain = runner(path, quantization="gguf"), runner(path)
    assert torch.equal(kept.model.model.embed_tokens.weight, plain.model.model.embed_tokens.weight)


def test_a_file_without_quantized_tensors_is_refused(write_gguf: WriteGGUF) -> None:
    with pytest.raises(ValueError, match="no quantized tensors"):
        runner(write_gguf(), quantization="gguf")


def test_what_else_it_needs(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ValueError, match="quantization must be one of gguf, got 'awq'"):
        runner(path, quantization="awq")
    with pytest.raises(ValueError, match=r"needs the weights of a \.gguf file"):
        runner(path, quantization="gguf", load_format="dummy")
