"""Small random checkpoints, made on the fly with transformers, which is also their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

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


def make_checkpoint(folder: Path, seed: int = 0, family: str = "Llama", **settings: Any) -> Any:
    """Save a random model of these settings into the folder and return it, in float32."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(DEFAULTS | settings))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual start: logits far enough apart for an argmax to be meaningful
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.12)
    model.save_pretrained(folder)
    return model


def write_gguf(model: Any, path: Path) -> None:
    """Save a Qwen in float32 as llama.cpp's converter does, which leaves the order of its rows."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            gguf_name = names.get_name(name, (".weight", ".bias"))
            writer.add_tensor(gguf_name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    "qwen2": {"family": "Qwen2"},
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
}
"""Name -> what differs from DEFAULTS."""
