"""Activations of the feed-forward block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from nano_vllm import ops

Activation = Callable[[torch.Tensor], torch.Tensor]

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


def activation(name: str) -> Activation:
    """The function for a checkpoint's `hidden_act`, of a feed-forward block without a gate."""
    known: dict[str, Activation] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    if name not in known:
        raise ValueError(f"hidden_act must be one of {', '.join(known)}, got {name!r}")
    return known[name]
