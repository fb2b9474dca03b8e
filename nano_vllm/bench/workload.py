"""Requests of random tokens, and how the engine is timed on them."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nano_vllm.engine.llm import LLM

REPEATS = 3


@dataclass(frozen=True)
class Workload:
    """Prompts of equal length, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_len: int

    @classmethod
    def random(
        cls, num_prompts: int, input_len: int, output_len: int, vocab_size: int, seed: int
    ) -> Workload:
        """Prompts of random token ids below 10,000 (or the vocabulary's size)."""
        for name, value in (
            ("num_prompts", num_prompts),
            ("input_len", input_len),
            ("output_len", output_len),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        draw = random.Random(seed)
        top = min(vocab_size, 10_000)
        prompts = [[draw.randrange(top) for _ in range(input_len)] for _ in range(num_prompts)]
        return cls(prompts, output_len)

    def with_output_len(self, output_len: int) -> Workload:
        return replace(self, output_len=output_len)

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return len(self.prompts) * self.output_len

    def figures(self, seconds: float) -> dict[str, float]:
        """The figures of a run that took so long."""
        return {
            "output tok/s": self.output_tokens / seconds,
            "total tok/s": (self.input_tokens + self.output_tokens) / seconds,
            "wall s": seconds,
        }

    def measure_llm(self, llm: LLM, temperature: float) -> dict[str, float]:
        """Median of several runs after one that warms up; give the engine prefix caching off."""
        from nano_vllm.sampling_params import SamplingParams

        params = SamplingParams(
            temperature=temperature, max_tokens=self.output_len, ignore_eos=True, detokenize=False
        )
        seconds = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            outputs = llm.generate(self.prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
            assert all(len(o.outputs[0].token_ids) == self.output_len for o in outputs)
        return self.figures(statistics.median(seconds[1:]))
