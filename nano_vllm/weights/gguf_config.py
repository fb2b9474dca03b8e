"""GGUF metadata -> ModelConfig."""

from __future__ import annotations

import math
import struct

from nano_vllm.config import ModelConfig, RopeScaling
from nano_vllm.weights.config_fields import ConfigFields
from nano_vllm.weights.gguf_file import GGUFFile

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_EOS_KEYS = ("eos", "eot", "eom")
"""End of text, of turn, of message: llama.cpp stops at each."""


def parse_gguf_config(file: GGUFFile) -> ModelConfig:
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
    return ModelConfig(
        architecture=_ARCHITECTURES[arch],
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.integer(f"{arch}.feed_forward_length"),
        num_layers=fields.integer(f"{arch}.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, fields, arch, rotary_dim, max_position),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=fields.integer("tokenizer.ggml.bos_token_id", None, minimum=0),
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
    )


def _rope_scaling(
    file: GGUFFile, fields: ConfigFields, arch: str, rotary_dim: int, max_position: int
) -> RopeScaling | None:
    key = f"{arch}.rope.scaling"
    kind = fields.string(f"{key}.type", "none")
    frequency_factors = _frequency_factors(file, rotary_dim)
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
        return RopeScaling(kind, factor, max_position)
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


def _frequency_factors(file: GGUFFile, rotary_dim: int) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies: what llama.cpp's converter makes of Llama 3's scaling."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    if tensor.type_name != "F32" or tensor.shape != (rotary_dim // 2,):
        raise ValueError(
            f"{file.path}: tensor 'rope_freqs.weight' must be F32 of shape [{rotary_dim // 2}], "
            f"got {tensor.type_name} of shape {list(tensor.shape)}"
        )
    with file.path.open("rb") as data:
        data.seek(tensor.offset)
        factors = struct.unpack(f"<{rotary_dim // 2}f", data.read(tensor.num_bytes))
    if not all(math.isfinite(f) and f > 0 for f in factors):
        raise ValueError(
            f"{file.path}: tensor 'rope_freqs.weight' must hold finite numbers above 0"
        )
    return None if all(f == 1.0 for f in factors) else factors
