"""config.json -> ModelConfig."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nano_vllm.config import ModelConfig
from nano_vllm.config_fields import MAX_LAYERS, REQUIRED, ConfigFields
from nano_vllm.model_family import FindFamily, ModelFamily
from nano_vllm.weights.json_file import read_json_object
from nano_vllm.weights.rope_config import parse_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
_DTYPES = ("float32", "float16", "bfloat16")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_CHANGES_THE_MATHS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (1, 1.0),
    "attention_sinks": (False,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "kv_lora_rank": (),
    "lm_head_bias": (False,),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "mlp_only_layers": ([],),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_kv_shared_layers": (0,),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}
"""Fields that some model computes by -> values that mean nothing is different. One that a family
does not read must have such a value, or be absent.
"""


def parse_hf_config(folder: Path, find_family: FindFamily) -> ModelConfig:
    """The decoder a Hugging Face folder describes; absent fields default as in LlamaConfig, where
    the family does not say otherwise.
    """
    path = folder / "config.json"
    values = read_json_object(path)
    fields = ConfigFields(values, str(path))
    if "quantization_config" in fields:
        raise fields.error(
            "quantization_config", "is not supported; load a checkpoint that is not quantized"
        )
    architecture = _architecture(fields)
    family = find_family(architecture)
    fields = ConfigFields({**family.config_defaults, **values}, str(path), family.config_names)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads",
            f"must divide num_attention_heads {num_heads}, got {num_kv_heads}",
        )
    if "head_dim" not in fields and hidden_size % num_heads:
        raise fields.error(
            "num_attention_heads", f"must divide hidden_size {hidden_size}, got {num_heads}"
        )
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    max_position = fields.integer("max_position_embeddings")
    by_type = family.rope_by_layer_type
    full_type, sliding_type = ("full_attention", "sliding_attention") if by_type else (None, None)
    rope, rotary_dim = parse_rope(fields, max_position, head_dim, full_type)
    num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    attention_bias = fields.flag("attention_bias", False)
    sliding_window, full_layers = _sliding_window(fields, family, num_layers)
    mlp_size = REQUIRED if family.mlp_ratio is None else family.mlp_ratio * hidden_size
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", mlp_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        hidden_act=_activation(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        sliding_window=sliding_window,
        full_attention_layers=full_layers,
        sliding_rope=(
            parse_rope(fields, max_position, head_dim, sliding_type)[0] if by_type else None
        ),
        dtype=_dtype(fields),
        bos_token_id=fields.integer("bos_token_id", None, minimum=0),
        eos_token_ids=_eos_token_ids(fields, folder),
    )
    config = family.read_config(replace(config, **family.always), fields)
    _refuse_unread(fields, values, architecture)
    return config


def _refuse_unread(fields: ConfigFields, values: dict[str, Any], architecture: str) -> None:
    for name, neutral in _CHANGES_THE_MATHS.items():
        value = values.get(name)
        if value is not None and name not in fields.asked and value not in neutral:
            raise fields.error(
                name, f"changes what a model computes; {architecture} has none, got {value!r}"
            )


def _architecture(fields: ConfigFields) -> str:
    names = fields.raw("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list of one name, got {names!r}")
    return names[0]


def _activation(fields: ConfigFields) -> str:
    name = fields.string("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise fields.error("hidden_act", f"must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _dtype(fields: ConfigFields) -> str | None:
    name = "dtype" if "dtype" in fields else "torch_dtype"  # transformers 5, before
    dtype = fields.string(name, None)
    if dtype is not None and dtype not in _DTYPES:
        raise fields.error(name, f"must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype


def _sliding_window(
    fields: ConfigFields, family: type[ModelFamily], num_layers: int
) -> tuple[int | None, frozenset[int]]:
    """The window, and the layers that do not have it."""
    is_used = fields.flag("use_sliding_window", True)
    window = fields.integer("sliding_window", None)
    if family.sliding_layers == "none" or not is_used:
        return None, frozenset()
    if family.sliding_layers == "all":
        return window, frozenset()
    kinds = fields.raw("layer_types", None)
    if kinds is None:
        if window is None:
            return None, frozenset()
        kinds = family.layer_types(fields, num_layers)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must be a list of {num_layers}, got {kinds!r}")
    unknown = [kind for kind in kinds if kind not in _LAYER_TYPES]
    if unknown:
        allowed = " or ".join(_LAYER_TYPES)
        raise fields.error("layer_types", f"must hold {allowed}, got {unknown[0]!r}")
    full = frozenset(i for i, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == num_layers:
        return None, frozenset()
    if window is None:
        raise fields.error("sliding_window", "is missing, and layer_types has sliding_attention")
    return window, full


def _eos_token_ids(fields: ConfigFields, folder: Path) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        ids += ConfigFields(read_json_object(generation), str(generation)).token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))
