"""What a model cannot do without, by its shape: bytes to read, operations to do, and the time that
these take at the device's own ceilings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nano_vllm.bench import timing
from nano_vllm.bench.workload import Workload
from nano_vllm.cache.kv_cache import bytes_per_block
from nano_vllm.config import ModelConfig


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

    @classmethod
    def measure(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        device: torch.device,
    ) -> Roofline:
        """With the ceilings of a GPU. A CPU, whose caches hold much of a small model, has none."""
        if device.type != "cuda":
            return cls(config, dtype, cache_dtype)
        copy, matmul = timing.copy_ceiling(device), timing.matmul_ceiling(device, dtype)
        return cls(config, dtype, cache_dtype, copy, matmul)

    @property
    def layer_weights(self) -> int:
        """Elements of all layers' matrices; norms and biases are nothing beside them."""
        c = self.config
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        attention = c.hidden_size * (qkv + c.num_heads * c.head_dim)
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def step_weight_bytes(self) -> int:
        """Read by every decode step: the layers and the language-model head."""
        head = self.config.vocab_size * self.config.hidden_size
        return (self.layer_weights + head) * self.dtype.itemsize

    def decode_bytes(self, workload: Workload) -> int:
        """Read after the prompts, if all requests advance together: in each step the weights once,
        and the keys and values of every sequence.
        """
        tokens = sum(
            self._attended(inputs + outputs - 1) - self._attended(inputs)
            for inputs, outputs in zip(workload.input_lens, workload.output_lens, strict=True)
        )
        steps = max(workload.output_lens) - 1
        per_token = bytes_per_block(self.config, 1, self.cache_dtype)
        return steps * self.step_weight_bytes + tokens * per_token

    def prefill_flops(self, workload: Workload) -> int:
        """Of the prompts: the layers' products, and attention over what the causal mask leaves."""
        c = self.config
        attention = 4 * c.num_layers * c.num_heads * c.head_dim
        return 2 * self.layer_weights * workload.input_tokens + attention * sum(
            map(self._attended, workload.input_lens)
        )

    def decode_seconds(self, workload: Workload) -> float | None:
        """The least time of the decode steps of all requests."""
        return None if self.copy is None else self.decode_bytes(workload) / self.copy

    def prefill_seconds(self, workload: Workload) -> float | None:
        """The least time of the prompts of all requests."""
        return None if self.matmul is None else self.prefill_flops(workload) / self.matmul

    def ceilings(self) -> dict[str, float]:
        """For the head of a report; empty where there are none."""
        if self.copy is None or self.matmul is None:
            return {}
        return {
            "copy GB/s": round(self.copy / 1e9),
            "matmul TFLOP/s": round(self.matmul / 1e12, 2),
        }

    def _attended(self, length: int) -> int:
        """Tokens that the queries at all positions below `length` see, themselves included."""
        window = min(length, self.config.sliding_window or length)
        return window * (window + 1) // 2 + (length - window) * window


def share(floor: float | None, seconds: float) -> float | None:
    """How much of the time the floor is."""
    return None if floor is None else floor / seconds
