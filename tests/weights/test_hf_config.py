from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from nano_vllm.config import ModelConfig, Rope, RopeScaling
from nano_vllm.models.registry import model_class
from nano_vllm.weights.hf_config import parse_hf_config
from nano_vllm.weights.model_config import load_model_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def parse(folder: Path) -> ModelConfig:
    return parse_hf_config(folder, model_class)


def write(folder: Path, changes: dict[str, Any] | None = None, generation: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps({**BASE, **(changes or {})}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_fields(tmp_path: Path) -> None:
    config = load_model_config(
        write(tmp_path, {"torch_dtype": "bfloat16", "mlp_bias": True}), model_class
    )
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (1000, 96, 256)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 6, 2)
    assert (config.head_dim, config.rotary_dim, config.max_position) == (16, None, 512)
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (5e5, None, 1e-5)
    assert (config.hidden_act, config.tie_word_embeddings) == ("silu", False)
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == (
        False,
        False,
        True,
    )
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == ("bfloat16", 1, (2,))


def test_olmo3_as_it_was_published(tmp_path: Path) -> None:
    """transformers 4: one base frequency, and a scaling that is not for the window's layers."""
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    changes = {"architectures": ["Olmo3ForCausalLM"], "rope_scaling": scaling}
    config = parse(write(tmp_path, {**changes, "num_hidden_layers": 5, "sliding_window": 7}))
    assert [config.window(layer) for layer in range(5)] == [7, 7, 7, 0, 7]
    assert config.rope(0) == Rope(5e5)
    full = config.rope(3)
    assert full is not None
    assert full.theta == 5e5
    assert full.scaling is not None
    assert (full.scaling.kind, full.scaling.factor) == ("yarn", 8.0)


def test_glm4_as_it_was_published(tmp_path: Path) -> None:
    changes = {"architectures": ["Glm4ForCausalLM"], "attention_bias": True, "head_dim": 32}
    config = parse(write(tmp_path, changes))
    assert (config.rotary_dim, config.rope_is_neox) == (16, False)
    assert (config.attention_bias, config.attention_output_bias) == (True, False)


def test_what_transformers_saves(tmp_path: Path) -> None:
    """The form of transformers 5: rope_parameters, dtype, every field written."""
    hf = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=80,
        num_attention_heads=5,
        head_dim=32,
        attention_bias=True,
        tie_word_embeddings=True,
        eos_token_id=[7, 8],
        rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3},
        dtype="float16",
    )
    hf.save_pretrained(tmp_path)
    config = parse(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (5, 32, "float16")
    assert (config.attention_bias, config.attention_output_bias) == (True, True)
    assert (config.tie_word_embeddings, config.eos_token_ids) == (True, (7, 8))
    assert config.rope_theta == 1e4
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 256, 1.0, 4.0)


ROPES = [
    ({}, "default", None),
    ({"factor": 4.0}, "linear", RopeScaling("linear", 4.0, 512)),
    ({"factor": 2.0}, "dynamic", RopeScaling("dynamic", 2.0, 512)),
    (LLAMA3, "llama3", RopeScaling("llama3", 8.0, 256, 1.0, 4.0)),
    (
        {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16, "mscale": 0.7},
        "yarn",
        RopeScaling("yarn", 4.0, 128, beta_fast=16.0, mscale=0.7),
    ),
    (
        {"factor": 4.0, "attention_factor": 1.5, "truncate": False},
        "yarn",
        RopeScaling("yarn", 4.0, 512, attention_factor=1.5, truncate=False),
    ),
]


@pytest.mark.parametrize(("values", "kind", "expected"), ROPES)
@pytest.mark.parametrize("form", ["type", "rope_type", "rope_parameters"])
def test_rope_forms(
    tmp_path: Path, values: dict[str, Any], kind: str, expected: RopeScaling | None, form: str
) -> None:
    if form == "rope_parameters":
        changes = {"rope_theta": None, form: {"rope_type": kind, "rope_theta": 5e5, **values}}
    else:
        changes = {"rope_scaling": {form: kind, **values}}
    config = parse(write(tmp_path, changes))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == expected


def test_partly_rotated_heads(tmp_path: Path) -> None:
    assert parse(write(tmp_path, {"partial_rotary_factor": 0.5})).rotary_dim == 8


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    folder = write(tmp_path, {"eos_token_id": 9}, generation={"eos_token_id": [3, 9, 4]})
    assert parse(folder).eos_token_ids == (9, 3, 4)


def test_sliding_window(tmp_path: Path) -> None:
    window = {"sliding_window": 64}
    mistral = {"architectures": ["MistralForCausalLM"], **window}
    assert parse(write(tmp_path, window)).sliding_window is None
    assert parse(write(tmp_path, mistral)).sliding_window == 64
    off = {**mistral, "use_sliding_window": False}
    assert parse(write(tmp_path, off)).sliding_window is None


def test_qwen_has_a_window_only_if_told(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 0}
    used = {**qwen, "use_sliding_window": True}

    def windows(**changes: Any) -> list[int]:
        config = parse(write(tmp_path, {**used, **changes}))
        return [config.window(layer) for layer in range(3)]

    assert parse(write(tmp_path, qwen)).sliding_window is None
    assert windows() == [64, 64, 64]
    assert windows(max_window_layers=1) == [0, 64, 64]
    assert windows(max_window_layers=3) == [0, 0, 0], "no layer is behind the third"
    sliding, full = "sliding_attention", "full_attention"
    assert windows(max_window_layers=3, layer_types=[sliding] * 3) == [64, 64, 64]
    assert windows(layer_types=[full] * 3) == [0, 0, 0]
    assert windows(layer_types=[full, sliding, full]) == [0, 64, 0]


def test_gemma3_of_old_and_new_form(tmp_path: Path) -> None:
    """The older form of config.json, in which Gemma 3 was published, leaves much out."""
    gemma = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "rope_theta": 1e6}
    linear = {"rope_type": "linear", "factor": 8.0}
    old = parse(write(tmp_path, gemma | {"rope_scaling": linear, "sliding_window": 32}))
    assert old.windows() == (0, 32)
    assert old.full_attention_layers == {5}
    assert old.rope(0) == Rope(10_000.0)
    assert old.rope(5) == Rope(1_000_000.0, RopeScaling("linear", 8.0, 64))
    assert (old.head_dim, old.attention_scale, old.tie_word_embeddings) == (256, 1 / 16, True)
    ropes = {
        "full_attention": linear | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new = parse(write(tmp_path, gemma | {"rope_parameters": ropes, "sliding_window": 32}))
    assert new == old


def test_phi3_of_old_form(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2] * 8}
    for kind in ("su", "yarn", "longrope"):
        phi = {
            "architectures": ["Phi3ForCausalLM"],
            "original_max_position_embeddings": 128,
            "rope_scaling": {"type": kind, **factors},
        }
        assert parse(write(tmp_path, phi)).rope_scaling == RopeScaling(
            "longrope", 4.0, 128, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8
        )


@pytest.mark.parametrize(
    ("architecture", "biases", "qk_norm"),
    [
        ("LlamaForCausalLM", (False, False), False),
        ("Qwen2ForCausalLM", (True, False), False),
        ("Qwen3ForCausalLM", (False, False), True),
    ],
)
def test_what_a_family_has_without_a_field(
    tmp_path: Path, architecture: str, biases: tuple[bool, bool], qk_norm: bool
) -> None:
    config = load_model_config(write(tmp_path, {"architectures": [architecture]}), model_class)
    assert config.architecture == architecture
    assert (config.attention_bias, config.attention_output_bias) == biases
    assert config.qk_norm == qk_norm


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in BASE
        if n
        not in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id")
    ],
)
def test_missing_field(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: field '{name}' is missing"):
        parse(write(tmp_path, {name: None}))


GEMMA2 = {"architectures": ["Gemma2ForCausalLM"]}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"]}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 96,
    "n_head": 6,
    "n_layer": 2,
    "n_positions": 64,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "96"}, "'hidden_size' must be an integer of at least 1, got '96'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be an integer of at least 1, got 0"),
        ({"vocab_size": True}, "'vocab_size' must be an integer"),
        ({"head_dim": 10**30}, "'head_dim' must be at most 2147483647, got 1000"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be at most 4096, got 1000000000"),
        ({"rope_theta": 10**400}, "'rope_theta' must be a finite number above 0, got 1000"),
        ({"rms_norm_eps": -1}, "'rms_norm_eps' must be a finite number above 0, got -1"),
        ({"rope_theta": float("inf")}, "'rope_theta' must be a finite number"),
        ({"num_key_value_heads": 4}, "'num_key_value_heads' must divide num_attention_heads 6"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "must divide hidden_size 96, got 7"),
        ({"hidden_act": "relu"}, "'hidden_act' must be one of silu, .*, got 'relu'"),
        ({"architectures": []}, "'architectures' must be a list of one name"),
        ({"eos_token_id": "x"}, "'eos_token_id' must be a token id or a list"),
        ({"torch_dtype": "float64"}, "'torch_dtype' must be one of float32"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be true or false"),
        ({"rope_scaling": 3}, "'rope_scaling' must be an object"),
        ({"rope_scaling": {"type": "ntk"}}, "'ntk' is not supported; supported: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor' is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "differs between layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "not supported"),
        ({"attn_logit_softcapping": 50.0}, "LlamaForCausalLM has none, got 50.0"),
        ({"use_bidirectional_attention": True}, "changes what a model computes"),
        ({"num_local_experts": 8}, "'num_local_experts' changes what a model computes"),
        ({"partial_rotary_factor": 0.1}, "must leave an even part of heads of 16, got 0.1: 1"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
         r"'short_factor' must be a list of 8 finite numbers above 0, got \[1.0\]"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [10**400] * 8}},
         "'short_factor' must be a list of 8 finite numbers above 0, got"),
        ({**GEMMA2, "layer_types": ["full_attention"]}, "'layer_types' must be a list of 3, got"),
        ({**GEMMA2, "layer_types": ["linear_attention"] * 3}, "got 'linear_attention'"),
        ({**GEMMA2, "layer_types": [["full_attention"]] * 3}, r"got \['full_attention'\]"),
        ({**GEMMA2, "num_hidden_layers": 10**30}, "'num_hidden_layers' must be at most 4096"),
        ({**GEMMA2, "sliding_window_pattern": 0}, "'sliding_window_pattern' must be an integer of"),
        ({**GEMMA2, "use_bidirectional_attention": True}, "changes what a model computes"),
        ({**SMOLLM3, "no_rope_layers": [[1], 0, 1]}, "must be a list of at least 3 of 0 or 1"),
        ({**SMOLLM3, "no_rope_layers": [1, 0]}, "must be a list of at least 3 of 0 or 1"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "changes what a model computes"),
        ({**GPT2, "n_embd": 0}, "'n_embd' must be an integer of at least 1, got 0"),
    ],
)  # fmt: skip
def test_invalid_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(write(tmp_path, changes))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000, "9" * 5000])
def test_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        parse(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        parse(tmp_path)


def test_an_architecture_is_checked_before_its_fields(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["FooForCausalLM"]}')
    message = "architecture 'FooForCausalLM' is not supported; supported: LlamaForCausalLM"
    with pytest.raises(ValueError, match=message):
        load_model_config(tmp_path, model_class)
