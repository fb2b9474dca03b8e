"""GGUF metadata -> ModelConfig."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

from nano_vllm.config import ModelConfig, Rope, RopeScaling
from nano_vllm.config_fields import MAX_LAYERS, ConfigFields
from nano_vllm.model_family import FindFamily
from nano_vllm.weights.gguf_file import GGUFFile

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_EOS_KEYS = ("eos", "eot", "eom")
"""End of text, of turn, of message: llama.cpp stops at each."""
_WITH_WINDOW = {"olmo2": "Olmo3ForCausalLM"}
"""What the same name stands for where the metadata have a sliding window."""
_FULL_ATTENTION_PERIODS = {"gemma2": 2, "gemma3": 6, "olmo2": 4}
"""Every how manyth layer has no sliding window; llama.cpp has the numbers in its code."""
_SLIDING_THETAS = {"gemma3": 10000.0}
"""Base frequency of the layers with the window; that of the others, if a model is not here."""
_NOPE_PERIODS = {"smollm3": 4}
"""Every how manyth layer rotates nothing; likewise."""
_UNSCALED_BY_HEAD_DIM = {"gemma2": 46, "gemma3": 62}
"""Layers of the models (27B) whose attention is scaled by hidden_size / num_heads; likewise."""
_SOFTCAPS = {"gemma2": (50.0, 30.0)}
"""Of scores and logits, where the metadata leave them out; likewise."""


def parse_gguf_config(file: GGUFFile, find_family: FindFamily) -> ModelConfig:
    """The decoder that a GGUF file describes; absent keys have llama.cpp's defaults."""
    fields = ConfigFields(file.metadata, str(file.path))
    arch = fields.string("general.architecture")
    if arch not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise ValueError(
            f"{file.path}: GGUF architecture {arch!r} is not supported; supported: {supported}"
        )
    if fields.integer(f"{arch}.expert_count", 0, minimum=0):
        raise ValueError(f"{file.path}: a mixture of experts is not supported")
    hidden_size = fields.integer(f"{arch}.embedding_length")
    num_heads = fields.integer(f"{arch}.attention.head_count")
    num_kv_heads = fields.integer(f"{arch}.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"{arch}.attention.head_count_kv", f"must divide {num_heads} heads, got {num_kv_heads}"
        )
    if f"{arch}.attention.key_length" not in fields and hidden_size % num_heads:
        raise fields.error(
            f"{arch}.attention.head_count", f"must divide {hidden_size}, got {num_heads}"
        )
    head_dim = fields.integer(f"{arch}.attention.key_length", hidden_size // num_heads)
    value_dim = fields.integer(f"{arch}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise fields.error(
            f"{arch}.attention.value_length", f"must be the key length {head_dim}, got {value_dim}"
        )
    rotary_dim = fields.integer(f"{arch}.rope.dimension_count", head_dim)
    if rotary_dim > head_dim or rotary_dim % 2:
        raise fields.error(
            f"{arch}.rope.dimension_count", f"must be even and at most {head_dim}, got {rotary_dim}"
        )
    max_position = fields.integer(f"{arch}.context_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing")
    eos_ids = [i for key in _EOS_KEYS for i in fields.token_ids(f"tokenizer.ggml.{key}_token_id")]
    num_layers = fields.integer(f"{arch}.block_count", maximum=MAX_LAYERS)
    sliding_window = fields.integer(f"{arch}.attention.sliding_window", 0, minimum=0) or None
    architecture = _ARCHITECTURES[arch]
    if sliding_window is not None:
        architecture = _WITH_WINDOW.get(arch, architecture)
    family = find_family(architecture)
    slides = family.sliding_layers != "none"
    rope_theta = fields.number(f"{arch}.rope.freq_base", 10000.0)
    has_layer_norm = "output_norm.bias" in file.tensors
    eps = "layer_norm_epsilon" if has_layer_norm else "layer_norm_rms_epsilon"
    hidden_act = "gelu_pytorch_tanh" if arch in ("gemma2", "gemma3", "gpt2") else "silu"
    softcap, logits_softcap = _SOFTCAPS.get(arch, (0.0, 0.0))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.number(f"{arch}.attention.{eps}"),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, fields, arch, rotary_dim, max_position),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        hidden_act=hidden_act,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        sliding_window=sliding_window if slides else None,
        full_attention_layers=_full_attention_layers(fields, arch, num_layers, slides),
        nope_layers=_every(_NOPE_PERIODS.get(arch), num_layers),
        sliding_rope=(
            Rope(fields.number(f"{arch}.rope.freq_base_swa", _SLIDING_THETAS.get(arch, rope_theta)))
            if family.rope_by_layer_type
            else None
        ),
        attention_scale=_attention_scale(fields, arch, num_layers, hidden_size // num_heads),
        attention_softcap=fields.number(f"{arch}.attn_logit_softcapping", softcap),
        logits_softcap=fields.number(f"{arch}.final_logit_softcapping", logits_softcap),
        embedding_multiplier=(
            hidden_size**0.5
            if arch in ("gemma2", "gemma3")
            else fields.number(f"{arch}.embedding_scale", 1.0)
        ),
        residual_multiplier=fields.number(f"{arch}.residual_scale", 1.0),
        logits_divisor=fields.number(f"{arch}.logit_scale", 1.0),
        bos_token_id=fields.integer("tokenizer.ggml.bos_token_id", None, minimum=0),
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
    )
    return replace(config, **family.always)


def _full_attention_layers(
    fields: ConfigFields, arch: str, num_layers: int, slides: bool
) -> frozenset[int]:
    """The layers without the sliding window."""
    if not slides:
        return frozenset()
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = fields.raw(key, None)
    if not isinstance(pattern, tuple):
        return _every(_FULL_ATTENTION_PERIODS.get(arch), num_layers)
    if len(pattern) != num_layers or not all(isinstance(slides, bool) for slides in pattern):
        raise fields.error(key, f"must be an array of {num_layers} of true or false")
    return frozenset(i for i, slides in enumerate(pattern) if not slides)


def _every(period: int | None, num_layers: int) -> frozenset[int]:
    return frozenset(range(period - 1, num_layers, period) if period else ())


def _attention_scale(
    fields: ConfigFields, arch: str, num_layers: int, hidden_per_head: int
) -> float | None:
    if _UNSCALED_BY_HEAD_DIM.get(arch) == num_layers:
        return hidden_per_head**-0.5
    return fields.number(f"{arch}.attention.scale", None)


def _rope_scaling(
    file: GGUFFile, fields: ConfigFields, arch: str, rotary_dim: int, max_position: int
) -> RopeScaling | None:
    key = f"{arch}.rope.scaling"
    kind = fields.string(f"{key}.type", "none")
    if "rope_factors_long.weight" in file.tensors:
        return _longrope(file, fields, arch, rotary_dim, max_position)
    frequency_factors = _factors(file, "rope_freqs.weight", rotary_dim // 2)
    if all(factor == 1.0 for factor in frequency_factors or ()):
        frequency_factors = None
    if frequency_factors is not None:
        if kind != "none":
            raise fields.error(
                f"{key}.type", f"must be none beside rope_freqs.weight, got {kind!r}"
            )
        return RopeScaling(
            "frequency_factors", 1.0, max_position, frequency_factors=frequency_factors
        )
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise fields.error(f"{key}.type", f"must be none, linear or yarn, got {kind!r}")
    factor = fields.number(f"{key}.factor")
    if kind == "linear":
        # Gemma 3's context is that of the stretched model.
        original = round(max_position / factor) if arch == "gemma3" else max_position
        return RopeScaling(kind, factor, original)
    # llama.cpp multiplies the magnitude of arXiv 2309.00071, eq. 22, by attn_factor.
    magnitude = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return RopeScaling(
        kind,
        factor,
        fields.integer(f"{key}.original_context_length", max_position),
        attention_factor=fields.number(f"{key}.attn_factor", 1.0) * magnitude,
        beta_fast=fields.number(f"{key}.yarn_beta_fast", 32.0),
        beta_slow=fields.number(f"{key}.yarn_beta_slow", 1.0),
    )


def _longrope(
    file: GGUFFile, fields: ConfigFields, arch: str, rotary_dim: int, max_position: int
) -> RopeScaling:
    key = f"{arch}.rope.scaling"
    original = fields.integer(f"{key}.original_context_length", max_position)
    short = _factors(file, "rope_factors_short.weight", rotary_dim // 2)
    long = _factors(file, "rope_factors_long.weight", rotary_dim // 2)
    if short is None or long is None:
        raise ValueError(f"{file.path}: tensor 'rope_factors_short.weight' is missing")
    return RopeScaling(
        "longrope",
        max_position / original,
        original,
        attention_factor=fields.number(f"{key}.attn_factor", 1.0),
        short_factors=short,
        long_factors=long,
    )


def _factors(file: GGUFFile, name: str, count: int) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies: what llama.cpp's converter makes of the scaling of Llama
    3 and of LongRoPE. None where the file has no such tensor.
    """
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type_name != "F32" or tensor.shape != (count,):
        raise ValueError(
            f"{file.path}: tensor {name!r} must be F32 of shape [{count}], "
            f"got {tensor.type_name} of shape {list(tensor.shape)}"
        )
    with file.path.open("rb") as data:
        data.seek(tensor.offset)
        factors = struct.unpack(f"<{count}f", data.read(tensor.num_bytes))
    if not all(math.isfinite(f) and f > 0 for f in factors):
        raise ValueError(f"{file.path}: tensor {name!r} must hold finite numbers above 0")
    return factors
