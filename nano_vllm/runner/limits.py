"""What a step may hold at the most, and in which dtype; without torch."""

from __future__ import annotations

from nano_vllm.config import HEAD_DIMS, EngineConfig, ModelConfig

MAX_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens computed in one step by default."""
MAX_GRAPH_TOKENS = 2048
"""Of a step with prompts that is a CUDA graph. The kernels of longer ones take longer than their
launches.
"""
DECODE_QUERIES = 8
"""Tokens of a sequence that the decode kernel takes on sm_90, in one row."""


def choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of a sequence: as told, else the model's context; ValueError beyond that."""
    scaling = model.rope_scaling
    limit = model.max_position
    stretches = scaling is not None and scaling.kind in ("linear", "dynamic", "yarn")
    if scaling is not None and stretches and scaling.original_max_position:
        limit = max(limit, int(scaling.original_max_position * scaling.factor))
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len must be at most the model's context of {limit}, "
            f"got {config.max_model_len}"
        )
    return config.max_model_len


def choose_max_num_batched_tokens(config: EngineConfig, device: str, max_model_len: int) -> int:
    """Tokens of a step; `device` is cpu or cuda."""
    return config.max_num_batched_tokens or max(
        MAX_BATCHED_TOKENS[device], 0 if config.enable_chunked_prefill else max_model_len
    )


def choose_dtype_name(name: str, stored: str | None, device: str) -> str:
    """The dtype asked for by name; for auto the checkpoint's own, if it names one."""
    if name == "auto":
        # A GGUF does not say. Its scales are float16, and bfloat16 would round the weights eight
        # times as coarsely.
        name = stored or ("float16" if device == "cuda" else "float32")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {name!r}")
    return name


def check_head_dim(model: ModelConfig, device: str) -> None:
    """ValueError where the attention kernels are not built for the model's heads."""
    if device == "cuda" and model.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))} on CUDA, "
            f"got {model.head_dim}"
        )
