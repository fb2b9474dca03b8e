"""What a model cannot do without, by its shape: bytes to read, operations to do, and the time that
these take at the device's own ceilings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nano_vllm.bench import timing
from nano_vllm.bench.workload import Workload
from nano_vllm.config import ModelConfig
from nano_vllm.model_size import (
    attended,
    bytes_per_block,
    head_elements,
    layer_flops,
    matrix_elements,
    windows,
)
from nano_vllm.step_record import StepRecord


@dataclass(frozen=True)
class Roofline:
    """A model against the ceilings of the device it runs on."""

    config: ModelConfig
    dtype: torch.dtype
    """Of the weights."""
    cache_dtype: torch.dtype
    """Of the KV cache."""
    copy: float | None = None
    """Bytes per second, read and written, of a large copy; None if unknown, as the next."""
    matmul: float | None = None
    """Floating-point operations per second of a large product."""
    is_quantized: bool = False
    """Whether the weights keep the bits of their file; how many bytes a step reads is then not
    known here.
    """

    @classmethod
    def measure(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        device: torch.device,
        is_quantized: bool = False,
    ) -> Roofline:
        """With the ceilings of a GPU. A CPU, whose caches hold much of a small model, has none."""
        if device.type != "cuda":
            return cls(config, dtype, cache_dtype, is_quantized=is_quantized)
        copy, matmul = timing.copy_ceiling(device), timing.matmul_ceiling(device, dtype)
        return cls(config, dtype, cache_dtype, copy, matmul, is_quantized)

    @property
    def layer_weights(self) -> int:
        """Elements of all layers' matrices; norms and biases are nothing beside them."""
        return self.config.num_layers * matrix_elements(self.config)

    @property
    def head_weights(self) -> int:
        """Elements of the language-model head."""
        return head_elements(self.config)

    @property
    def step_weight_bytes(self) -> int:
        """Read by every decode step: the layers and the language-model head."""
        return (self.layer_weights + self.head_weights) * self.dtype.itemsize

    @property
    def token_kv_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return bytes_per_block(self.config, 1, self.cache_dtype.itemsize)

    def decode_bytes(self, workload: Workload) -> int:
        """Read after the prompts, if all requests advance together: in each step the weights once,
        and the keys and values of every sequence.
        """
        tokens = sum(
            attended(self.config, inputs + outputs - 1) - attended(self.config, inputs)
            for inputs, outputs in zip(workload.input_lens, workload.output_lens, strict=True)
        )
        steps = max(workload.output_lens) - 1
        kv_bytes = tokens * self.token_kv_bytes // self.config.num_layers
        return steps * self.step_weight_bytes + kv_bytes

    def prefill_flops(self, workload: Workload) -> int:
        """Of the prompts: the layers' products, and attention over what the causal mask leaves. So
        much of it as the engine's last layer leaves out, of tokens that don't sample, counts, too.
        """
        return layer_flops(self.config, workload.input_lens, workload.input_lens)

    def step_bytes(self, step: StepRecord) -> int | None:
        """Read by a step: the weights once, and the keys and values that its tokens attend over.
        None where the weights are quantized.
        """
        if self.is_quantized:
            return None
        tokens = sum(
            min(length, (window or length) + queries - 1)
            for queries, length in zip(step.query_lens, step.seq_lens, strict=True)
            for window in windows(self.config)
        )
        return self.step_weight_bytes + tokens * self.token_kv_bytes // self.config.num_layers

    def step_flops(self, step: StepRecord) -> int:
        """Of a step, likewise, and the head's product for the sequences that get a token."""
        head = 2 * self.head_weights * step.num_sampled
        return head + layer_flops(self.config, step.query_lens, step.seq_lens)

    def decode_seconds(self, workload: Workload) -> float | None:
        """The least time of the decode steps of all requests."""
        return None if self.copy is None else self.decode_bytes(workload) / self.copy

    def prefill_seconds(self, workload: Workload) -> float | None:
        """The least time of the prompts of all requests."""
        return None if self.matmul is None else self.prefill_flops(workload) / self.matmul

    def step_seconds(self, step: StepRecord) -> float | None:
        """The least time of a step: that of its bytes or that of its operations, the longer one."""
        num_bytes = self.step_bytes(step)
        if self.copy is None or self.matmul is None or num_bytes is None:
            return None
        return max(num_bytes / self.copy, self.step_flops(step) / self.matmul)

    def ceilings(self) -> dict[str, float]:
        """For the head of a report; empty where there are none."""
        if self.copy is None or self.matmul is None:
            return {}
        return {
            "copy GB/s": round(self.copy / 1e9),
            "matmul TFLOP/s": round(self.matmul / 1e12, 2),
        }


def share(floor: float | None, seconds: float) -> float | None:
    """How much of the time the floor is."""
    return None if floor is None else floor / seconds
