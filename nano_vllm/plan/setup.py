"""The model, the engine's options and the GPUs that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from nano_vllm.config import EngineConfig, ModelConfig
from nano_vllm.gpus import GPU
from nano_vllm.model_size import ITEMSIZES
from nano_vllm.models.registry import model_family
from nano_vllm.runner.limits import (
    check_head_dim,
    choose_dtype_name,
    choose_max_model_len,
    choose_max_num_batched_tokens,
)
from nano_vllm.weights.model_config import load_model_config
from nano_vllm.weights.resolve import resolve_model


@dataclass(frozen=True)
class Layout:
    """How many GPUs share the layers, and into how many stages these are split."""

    tp: int
    pp: int

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp}"


@dataclass(frozen=True)
class Setup:
    """What does not depend on the layout; the engine's own choices for a GPU."""

    model: ModelConfig
    config: EngineConfig
    gpu: GPU
    gpus_per_host: int
    dtype: str
    itemsize: int
    """Bytes of an element of weights and activations."""
    cache_itemsize: int
    """Bytes of an element of keys and values."""
    max_model_len: int
    max_num_batched_tokens: int

    @classmethod
    def read(cls, config: EngineConfig, gpu: GPU, gpus_per_host: int) -> Setup:
        """From the model's configuration or the header of its file; ValueError for what cannot run
        on a GPU.
        """
        path = resolve_model(config.model, config.load_format, with_weights=False)
        model = load_model_config(path, model_family)
        return cls.of(model, config, gpu, gpus_per_host)

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, gpu: GPU, gpus_per_host: int) -> Setup:
        if gpus_per_host < 1:
            raise ValueError(f"gpus_per_host must be at least 1, got {gpus_per_host}")
        check_head_dim(model, "cuda")
        dtype = choose_dtype_name(config.dtype, model.dtype, "cuda")
        cache_dtype = dtype if config.kv_cache_dtype == "auto" else "fp8"
        max_model_len = choose_max_model_len(config, model)
        itemsize = ITEMSIZES[dtype]
        return cls(
            model,
            config,
            gpu,
            gpus_per_host,
            dtype,
            itemsize,
            ITEMSIZES[cache_dtype],
            max_model_len,
            choose_max_num_batched_tokens(config, max_model_len, model, itemsize, gpu),
        )
