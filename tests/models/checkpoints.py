"""Small random checkpoints, made on the fly with transformers, which is also their oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

from nano_vllm.check import randomize

DEFAULTS: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


ABSENT = object()
"""A setting of DEFAULTS that a family does not have."""
CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}
"""Names of transformers' configuration and model that are not as usual."""


def make_checkpoint(folder: Path, seed: int = 0, family: str = "Llama", **settings: Any) -> Any:
    """Save a random model of these settings into the folder and return it, in float32."""
    config_name, model_name = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    settings = {k: v for k, v in (DEFAULTS | settings).items() if v is not ABSENT}
    config = getattr(transformers, config_name)(**settings)
    model = randomize(getattr(transformers, model_name)(config), seed)
    model.save_pretrained(folder)
    return model


GGUF_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
"""transformers' model_type -> that of llama.cpp."""


def write_gguf(
    model: Any,
    path: Path,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    add_vocabulary: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Save a model as llama.cpp's converter does (convert_hf_to_gguf.py), vectors in float32."""
    config = model.config
    kind = config.model_type
    arch = GGUF_ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    if add_vocabulary is not None:
        add_vocabulary(writer)
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
    num_kv_heads = getattr(config, "num_key_value_heads", num_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(num_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(num_kv_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        write_gguf_rope(writer, config, head_dim)
    if kind in ("gemma2", "gemma3_text", "phi3", "olmo3") and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if kind == "olmo3":
        writer.add_sliding_window_pattern([t == "sliding_attention" for t in config.layer_types])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if kind in ("llama", "smollm3", "granite") and name.split(".")[-2] in ("q_proj", "k_proj"):
            halves = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        kind_of = matrices if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.contiguous().numpy(), kind_of)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for which in ("short", "long"):
            factors = np.array(rope[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)


GPT2: dict[str, Any] = {
    "family": "GPT2",
    "n_positions": 256,
    "n_layer": 2,
    "num_hidden_layers": ABSENT,
    "hidden_size": ABSENT,
    "num_attention_heads": ABSENT,
    "num_key_value_heads": ABSENT,
    "max_position_embeddings": ABSENT,
    "intermediate_size": ABSENT,
    "head_dim": ABSENT,
    "tie_word_embeddings": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi-query": {"num_key_value_heads": 1, "head_dim": 80},
    "multi-head, tied": {"num_key_value_heads": 4, "head_dim": 96, "tie_word_embeddings": True},
    "odd group": {
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
    "high theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear scaling": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "dynamic scaling": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    },
    "llama3 scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn scaling": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "mistral, sliding window": {"family": "Mistral", "sliding_window": 12},
    "mistral, multi-head, tied": {
        "family": "Mistral",
        "num_key_value_heads": 4,
        "head_dim": 96,
        "sliding_window": 40,
        "tie_word_embeddings": True,
    },
    "qwen2": {"family": "Qwen2"},
    "qwen2, windows in the last layers": {
        "family": "Qwen2",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 2,
    },
    "qwen2, tied, sliding window": {
        "family": "Qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 0,
    },
    "qwen3": {"family": "Qwen3"},
    "qwen3, tied, wide": {
        "family": "Qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3, biases": {"family": "Qwen3", "attention_bias": True},
    "qwen3, windows in the last layers": {
        "family": "Qwen3",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "mistral, yarn scaling": {
        "family": "Mistral",
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.6,
        },
    },
    "ministral": {"family": "Ministral", "sliding_window": 9},
    "ministral, windows in some layers": {
        "family": "Ministral",
        "num_hidden_layers": 3,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "ministral, multi-head": {
        "family": "Ministral",
        "num_key_value_heads": 4,
        "sliding_window": 25,
        "head_dim": 96,
    },
    "gemma2": {"family": "Gemma2", "sliding_window": 11, "query_pre_attn_scalar": 40},
    "gemma2, low caps": {
        "family": "Gemma2",
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 64,
    },
    "gemma2, no caps, other layers": {
        "family": "Gemma2",
        "head_dim": 96,
        "sliding_window": 17,
        "layer_types": ["full_attention", "sliding_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3": {
        "family": "Gemma3",
        "num_hidden_layers": 6,
        "sliding_window": 11,
        "query_pre_attn_scalar": 64,
    },
    "gemma3, scaled": {
        "family": "Gemma3",
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 50,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gemma3, capped logits": {
        "family": "Gemma3",
        "head_dim": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": 21,
        "layer_types": ["full_attention", "sliding_attention"],
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
    "phi3": {"family": "Phi3", "pad_token_id": 0},
    "phi3, part of a head rotated, sliding window": {
        "family": "Phi3",
        "pad_token_id": 0,
        "hidden_size": 384,
        "head_dim": ABSENT,
        "num_key_value_heads": 4,
        "sliding_window": 14,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "phi3, long": {
        "family": "Phi3",
        "pad_token_id": 0,
        "hidden_size": 256,
        "head_dim": ABSENT,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + i / 30 for i in range(24)],
            "long_factor": [1.0 + i * i / 20 for i in range(24)],
        },
    },
    "smollm3": {"family": "SmolLM3", "num_hidden_layers": 4, "pad_token_id": 0},
    "smollm3, own layers": {
        "family": "SmolLM3",
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "no_rope_layers": [0, 1, 0],
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "smollm3, windows": {
        "family": "SmolLM3",
        "pad_token_id": 0,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 10,
        "head_dim": 80,
    },
    "olmo2": {"family": "Olmo2", "pad_token_id": 0},
    "olmo2, multi-head, tied": {
        "family": "Olmo2",
        "pad_token_id": 0,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "tie_word_embeddings": True,
    },
    "olmo2, yarn scaling": {
        "family": "Olmo2",
        "pad_token_id": 0,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        },
    },
    "olmo3": {
        "family": "Olmo3",
        "pad_token_id": 0,
        "num_hidden_layers": 4,
        "sliding_window": 11,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        },
    },
    "olmo3, multi-head, tied": {
        "family": "Olmo3",
        "pad_token_id": 0,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "sliding_window": 21,
        "tie_word_embeddings": True,
    },
    "olmo3, own layers, biases": {
        "family": "Olmo3",
        "pad_token_id": 0,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 6,
        "attention_bias": True,
    },
    "glm4": {"family": "Glm4", "pad_token_id": 0},
    "glm4, most of a head rotated, no biases": {
        "family": "Glm4",
        "pad_token_id": 0,
        "num_hidden_layers": 3,
        "head_dim": 80,
        "num_key_value_heads": 1,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "partial_rotary_factor": 0.8,
        },
    },
    "glm4, yarn scaling, tied": {
        "family": "Glm4",
        "pad_token_id": 0,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
        },
    },
    "granite": {
        "family": "Granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "logits_scaling": 8.0,
    },
    "granite, tied": {
        "family": "Granite",
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 1.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
    },
    "granite, biases": {
        "family": "Granite",
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 96,
        "num_key_value_heads": 4,
        "attention_multiplier": 0.1,
    },
    "gpt2": GPT2 | {"n_embd": 256, "n_head": 4},
    "gpt2, unscaled": GPT2
    | {"n_embd": 160, "n_head": 2, "scale_attn_weights": False, "activation_function": "gelu"},
    "gpt2, own width": GPT2 | {"n_embd": 128, "n_head": 2, "n_inner": 176, "n_layer": 3},
}
"""Name -> what differs from DEFAULTS."""
