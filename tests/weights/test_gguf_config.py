from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nano_vllm.config import ModelConfig, Rope, RopeScaling
from nano_vllm.models.registry import model_class
from nano_vllm.weights.model_config import load_model_config
from tests.weights.conftest import LLAMA_METADATA


def test_fields(write_gguf: Callable[..., Path]) -> None:
    config = load_model_config(write_gguf({"tokenizer.ggml.eot_token_id": 5}), model_class)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (50, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (1, 4, 2)
    assert (config.head_dim, config.rotary_dim, config.max_position) == (16, None, 128)
    assert (config.rope_theta, config.rope_scaling) == (5000.0, None)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert (config.tie_word_embeddings, config.dtype) == (True, None)
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    assert biases == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 5))


def test_tensors_tell_ties_and_biases(write_gguf: Callable[..., Path]) -> None:
    extra = {
        "output.weight": np.zeros((50, 64), np.float32),
        "blk.0.attn_q.bias": np.zeros(64, np.float32),
        "blk.0.ffn_gate.bias": np.zeros(96, np.float32),
    }
    config = load_model_config(write_gguf(tensors=extra), model_class)
    assert not config.tie_word_embeddings
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == (
        True,
        False,
        True,
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0, 128)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            RopeScaling("yarn", 4.0, 32, attention_factor=0.1 * math.log(4.0) + 1),
        ),
    ],
)
def test_rope_scaling(
    write_gguf: Callable[..., Path], values: dict[str, Any], expected: RopeScaling | None
) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in values.items()}
    assert load_model_config(write_gguf(metadata), model_class).rope_scaling == expected


def window_layers(config: ModelConfig) -> list[int]:
    return [config.window(layer) for layer in range(config.num_layers)]


def test_olmo3_is_an_olmo2_with_a_window(write_gguf: Callable[..., Path]) -> None:
    shape: dict[str, Any] = {
        **{k.replace("llama", "olmo2"): v for k, v in LLAMA_METADATA.items() if "llama" in k},
        "olmo2.block_count": 5,
        "olmo2.rope.scaling.type": "yarn",
        "olmo2.rope.scaling.factor": 8.0,
    }
    config = load_model_config(write_gguf(shape, arch="olmo2"), model_class)
    assert (config.architecture, config.sliding_rope) == ("Olmo2ForCausalLM", None)
    assert window_layers(config) == [0] * 5
    shape["olmo2.attention.sliding_window"] = 7
    config = load_model_config(write_gguf(shape, arch="olmo2"), model_class)
    assert (config.architecture, window_layers(config)) == ("Olmo3ForCausalLM", [7, 7, 7, 0, 7])
    assert config.rope_scaling is not None
    assert config.sliding_rope == Rope(5000.0)
    shape["olmo2.attention.sliding_window_pattern"] = [True, False, False, True, True]
    config = load_model_config(write_gguf(shape, arch="olmo2"), model_class)
    assert window_layers(config) == [7, 0, 0, 7, 7]
    shape["olmo2.attention.sliding_window_pattern"] = [True]
    with pytest.raises(ValueError, match="must be an array of 5 of true or false"):
        load_model_config(write_gguf(shape, arch="olmo2"), model_class)


def test_frequency_factors(write_gguf: Callable[..., Path]) -> None:
    factors = np.array([1, 1, 1, 2, 3, 8, 8, 8], np.float32)
    config = load_model_config(write_gguf(tensors={"rope_freqs.weight": factors}), model_class)
    assert config.rope_scaling == RopeScaling(
        "frequency_factors", 1.0, 128, frequency_factors=tuple(factors.tolist())
    )
    ones = load_model_config(
        write_gguf(tensors={"rope_freqs.weight": np.ones(8, np.float32)}), model_class
    )
    assert ones.rope_scaling is None


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.block_count": None}, {}, "field 'llama.block_count' is missing"),
        ({"llama.block_count": "x"}, {}, "'llama.block_count' must be an integer"),
        ({"llama.attention.head_count_kv": 3}, {}, "must divide 4 heads, got 3"),
        ({"llama.attention.head_count_kv": [2, 2]}, {}, r"must be an integer .*got \(2, 2\)"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "must be none, linear or yarn"),
        ({"llama.rope.dimension_count": 32}, {}, "must be even and at most 16, got 32"),
        ({"llama.expert_count": 8}, {}, "mixture of experts is not supported"),
        ({}, {"rope_freqs.weight": np.ones(4, np.float32)}, r"must be F32 of shape \[8\]"),
        ({}, {"rope_freqs.weight": np.zeros(8, np.float32)}, "finite numbers above 0"),
    ],
)
def test_invalid(
    write_gguf: Callable[..., Path],
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model_config(write_gguf(metadata, tensors), model_class)
    assert "model.gguf" in str(error.value)


def test_unsupported_architecture(write_gguf: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError, match="'falcon' is not supported; supported: llama, qwen2, qwen3, gemma2"
    ):
        load_model_config(write_gguf(arch="falcon"), model_class)
