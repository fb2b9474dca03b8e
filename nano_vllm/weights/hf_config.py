"""config.json -> ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nano_vllm.config import ModelConfig
from nano_vllm.weights.config_fields import ConfigFields
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
_QWEN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


def parse_hf_config(
    folder: Path, check_architecture: Callable[[str], object] | None = None
) -> ModelConfig:
    """The decoder a Hugging Face folder describes; absent fields default as in LlamaConfig.

    Which architectures can run is decided by the model registry: `check_architecture` raises
    ValueError for another one, before the fields are looked for that such a model may not have.
    """
    path = folder / "config.json"
    fields = ConfigFields(read_json_object(path), str(path))
    if "quantization_config" in fields:
        raise fields.error(
            "quantization_config", "is not supported; load a checkpoint that is not quantized"
        )
    architecture = _architecture(fields)
    if check_architecture is not None:
        check_architecture(architecture)
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
    rope_theta, rotated_share, rope_scaling = parse_rope(fields, max_position)
    rotary_dim = int(head_dim * rotated_share)
    num_layers = fields.integer("num_hidden_layers")
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        hidden_act=_activation(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        # Qwen2 has biases, and Qwen3 norms, without a field for them.
        attention_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        attention_output_bias=attention_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        mlp_bias=fields.flag("mlp_bias", False),
        sliding_window=_sliding_window(fields, architecture, num_layers),
        dtype=_dtype(fields),
        bos_token_id=fields.integer("bos_token_id", None, minimum=0),
        eos_token_ids=_eos_token_ids(fields, folder),
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


def _sliding_window(fields: ConfigFields, architecture: str, num_layers: int) -> int | None:
    layer_types = fields.raw("layer_types", [])
    if not isinstance(layer_types, list):
        raise fields.error("layer_types", f"must be a list, got {layer_types!r}")
    if len(set(map(str, layer_types))) > 1:
        raise fields.error("layer_types", "mixes kinds of attention, which is not supported")
    # Llama has no window whatever its config says; Qwen has one only if told to use it.
    is_used = fields.flag("use_sliding_window", architecture not in _QWEN)
    if architecture == "LlamaForCausalLM" or not is_used or "full_attention" in layer_types:
        return None
    window = fields.integer("sliding_window", None)
    if architecture in _QWEN and window is not None and not layer_types:
        # The layers from this one on have the window.
        first = fields.integer("max_window_layers", minimum=0)
        if 0 < first < num_layers:
            raise fields.error(
                "max_window_layers",
                f"must be 0 or at least {num_layers} (kinds of attention cannot be mixed), "
                f"got {first}",
            )
        return window if first == 0 else None
    return window


def _eos_token_ids(fields: ConfigFields, folder: Path) -> tuple[int, ...]:
    ids = fields.token_ids("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        ids += ConfigFields(read_json_object(generation), str(generation)).token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))
