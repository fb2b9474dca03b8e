"""Gated activations of the feed-forward block."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nano_vllm import ops

GatedActivation = Callable[[torch.Tensor, torch.Tensor], None]
"""(out [num_tokens, intermediate_size], gate and up [num_tokens, 2 * intermediate_size])."""


def gated_activation(name: str) -> GatedActivation:
    """The op for a checkpoint's `hidden_act`; ValueError names the supported ones."""
    known: dict[str, GatedActivation] = {
        "silu": ops.silu_and_mul,
        "gelu": ops.gelu_and_mul,
        "gelu_pytorch_tanh": lambda out, x: ops.gelu_and_mul(out, x, "tanh"),
    }
    if name not in known:
        raise ValueError(f"hidden_act must be one of {', '.join(known)}, got {name!r}")
    return known[name]
