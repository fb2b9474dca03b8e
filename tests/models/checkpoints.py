"""Small random checkpoints, made on the fly with transformers, which is also their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


def make_llama(folder: Path, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Save a random Llama of these settings into the folder and return it, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(**(DEFAULTS | settings))
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual start: logits far enough apart for an argmax to be meaningful
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.12)
    model.save_pretrained(folder)
    return model


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
}
"""Name -> what differs from DEFAULTS."""
