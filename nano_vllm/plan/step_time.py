"""How long a step takes on a GPU that holds a stage: bytes and operations at the rates that kernels
were measured to reach, and what each kernel takes besides.

The figures are those of docs/benchmarks.md, of kernels alone; one factor, IN_A_STEP, is fitted to
whole steps. docs/distributed.md compares the model with what was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from nano_vllm.config import ModelConfig
from nano_vllm.model_size import attention_flops, layer_matrices, windows
from nano_vllm.plan.communication import all_reduce_seconds
from nano_vllm.plan.fit import Stage
from nano_vllm.plan.setup import Setup

OWN_PRODUCT_ROWS = 32
"""Products of up to so many rows are the project's own, with gate, up and their product in one."""
OWN_PRODUCT_SECONDS = 2.3e-6
"""Of a product beyond its bytes: 2.0, 2.8, 2.0, 2.4 us (0.6B) and 1.8, 2.8, 3.5, 2.3 us (8B)."""
PRODUCT_SECONDS = 4.0e-6
"""Of cuBLAS at 128 rows: 3.1, 4.5, 2.9, 5.6 us (0.6B)."""
ATTENTION_SECONDS = 5.0e-6
"""Of a decode beyond its keys and values: 5.9, 6.8, 4.9 us at 1, 8 and 64 x 1024 tokens; shorter
contexts are split less.
"""
SMALL_KERNEL_SECONDS = 1.8e-6
"""Of a norm, a rotation or an activation beyond its bytes."""
STEP_SECONDS = 25e-6
"""The attention's plan (6 to 12 us), sampling (10), the embedding, the gap behind a step (1.3)."""
IN_A_STEP = 1.07
"""What kernels take in a step of decodes, by what they take alone: fitted to the eight times per
output token that were measured on an H200.
"""
PREFILL_STEP_SECONDS = 600e-6
"""Between steps with prompts, which wait for one another: 0.4 to 0.9 ms."""
SUSTAINED_PRODUCT = 676 / 785
"""Of the large product's rate, under load: the card throttles."""
SUSTAINED_ATTENTION = 556 / 785
"""Of the same, for the attention of prompts: 537 to 602 TFLOP/s under load."""
ROTATION_OF_COPY = 0.6
"""Of the copy's rate that rotation with its write to the cache reaches."""


class StepTime(NamedTuple):
    """Seconds of one step on one GPU."""

    products: float
    attention: float
    small_kernels: float
    collectives: float
    fixed: float

    @property
    def total(self) -> float:
        return sum(self)


def decode_step(setup: Setup, stage: Stage, batch: int, context: int, tp: int) -> StepTime:
    """A step of one token for each of `batch` sequences, as a CUDA graph.

    Args:
        setup: GPU and dtypes.
        stage: what the GPU holds.
        batch: sequences.
        context: tokens of each.
        tp: GPUs that share the stage.
    """
    shape = stage.shape
    each = PRODUCT_SECONDS if batch > OWN_PRODUCT_ROWS else OWN_PRODUCT_SECONDS
    attention = 0.0
    for window in windows(shape):
        seen = min(context, window or context)
        elements = batch * seen * 2 * shape.num_kv_heads * shape.head_dim
        flops = 4 * batch * seen * shape.num_heads * shape.head_dim
        attention += ATTENTION_SECONDS + max(
            elements * setup.cache_itemsize / setup.gpu.copy, flops / setup.gpu.matmul
        )
    kernels = 3 if batch <= OWN_PRODUCT_ROWS else 4
    small = shape.num_layers * kernels * SMALL_KERNEL_SECONDS + _small_kernels(setup, shape, batch)
    return StepTime(
        IN_A_STEP * _products(setup, shape, batch, batch if stage.place.is_last else 0, each, 1.0),
        IN_A_STEP * attention,
        IN_A_STEP * small,
        _collectives(setup, stage, batch, tp),
        STEP_SECONDS,
    )


def prefill_step(setup: Setup, stage: Stage, num_tokens: int, prompt_len: int, tp: int) -> StepTime:
    """A step of num_tokens of whole prompts, or of the mean part of a longer one.

    Args:
        setup: GPU and dtypes.
        stage: what the GPU holds.
        num_tokens: of the step.
        prompt_len: tokens of a prompt.
        tp: GPUs that share the stage.
    """
    shape = stage.shape
    num_prompts = num_tokens / prompt_len
    attention = num_prompts * attention_flops(shape, prompt_len, prompt_len)
    rows = max(1, round(num_prompts)) if stage.place.is_last else 0
    return StepTime(
        _products(setup, shape, num_tokens, rows, PRODUCT_SECONDS, SUSTAINED_PRODUCT),
        attention / (setup.gpu.matmul * SUSTAINED_ATTENTION),
        _small_kernels(setup, shape, num_tokens),
        _collectives(setup, stage, num_tokens, tp),
        PREFILL_STEP_SECONDS,
    )


def _products(
    setup: Setup, shape: ModelConfig, rows: int, head_rows: int, each: float, share: float
) -> float:
    """All products of a step; `each` is what one takes beyond its bytes, `share` that of the large
    product's rate.
    """

    def seconds(rows: int, columns_in: int, columns_out: int) -> float:
        elements = columns_in * columns_out + rows * (columns_in + columns_out)
        flops = 2 * rows * columns_in * columns_out
        return each + max(
            elements * setup.itemsize / setup.gpu.copy, flops / (setup.gpu.matmul * share)
        )

    total = shape.num_layers * sum(seconds(rows, *m) for m in layer_matrices(shape).values())
    if head_rows:
        total += seconds(head_rows, shape.hidden_size, shape.vocab_size)
    return total


def _small_kernels(setup: Setup, shape: ModelConfig, rows: int) -> float:
    """Bytes that norms, rotation and activation of all layers read and write, at their rates."""
    norms = 2 * 4 * shape.hidden_size
    rotation = 2 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    activation = (3 if shape.gated_mlp else 2) * shape.intermediate_size
    if rows <= OWN_PRODUCT_ROWS:
        activation = 0
    elements = rows * (norms + rotation / ROTATION_OF_COPY + activation)
    return shape.num_layers * elements * setup.itemsize / setup.gpu.copy


def _collectives(setup: Setup, stage: Stage, rows: int, tp: int) -> float:
    """Two all-reduces a layer, one behind the embedding; what the ranks tell each other of sampled
    tokens counts as another.
    """
    num_bytes = rows * stage.shape.hidden_size * setup.itemsize
    each = all_reduce_seconds(setup.gpu.links, num_bytes, tp, setup.gpus_per_host)
    return (2 * stage.shape.num_layers + stage.place.is_first + stage.place.is_last) * each
