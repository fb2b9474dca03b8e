"""A small LLM inference engine with its own CUDA kernels and C++ block allocator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nano_vllm.config import EngineConfig
    from nano_vllm.engine.llm import LLM
    from nano_vllm.engine.session import Session
    from nano_vllm.logprob import Logprob
    from nano_vllm.outputs import CompletionOutput, RequestOutput, ScoreOutput
    from nano_vllm.sampling_params import BeamSearchParams, SamplingParams

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "Session",
]

_HOME = {
    "LLM": "nano_vllm.engine.llm",
    "BeamSearchParams": "nano_vllm.sampling_params",
    "CompletionOutput": "nano_vllm.outputs",
    "EngineConfig": "nano_vllm.config",
    "Logprob": "nano_vllm.logprob",
    "RequestOutput": "nano_vllm.outputs",
    "SamplingParams": "nano_vllm.sampling_params",
    "ScoreOutput": "nano_vllm.outputs",
    "Session": "nano_vllm.engine.session",
}


def __getattr__(name: str) -> Any:
    # Public names come when they are asked for, so that the import stays quick.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
