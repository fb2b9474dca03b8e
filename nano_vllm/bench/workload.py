"""Requests of random tokens, and how the engine is timed on them."""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nano_vllm.engine.llm import LLM
    from nano_vllm.step_record import StepRecord

MAX_TOKEN_ID = 10_000
"""Largest token id of a prompt, if the vocabulary has it."""


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to generate for each."""

    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def random(
        cls,
        num_prompts: int,
        input_len: tuple[int, int],
        output_len: tuple[int, int],
        vocab_size: int,
        seed: int,
    ) -> Workload:
        """Uniform lengths and token ids.

        Args:
            num_prompts: at least 1.
            input_len: tokens of a prompt, from and to, both included.
            output_len: tokens to generate, likewise.
            vocab_size: token ids are below it, and at most MAX_TOKEN_ID.
            seed: of the draws: first each prompt, its length before its tokens, then the outputs.
        """
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        for name, (low, high) in (("input_len", input_len), ("output_len", output_len)):
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be at least 1 and not fall, got {low}-{high}")
        draw = random.Random(seed)
        top = min(vocab_size - 1, MAX_TOKEN_ID)
        prompts = [
            [draw.randint(0, top) for _ in range(draw.randint(*input_len))]
            for _ in range(num_prompts)
        ]
        return cls(prompts, [draw.randint(*output_len) for _ in prompts])

    def with_output_len(self, output_len: int) -> Workload:
        return replace(self, output_lens=[output_len] * len(self.prompts))

    @property
    def input_lens(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def input_tokens(self) -> int:
        return sum(self.input_lens)

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    def figures(self, seconds: float) -> dict[str, float]:
        """The figures of a run that took so long."""
        return {
            "output tok/s": self.output_tokens / seconds,
            "total tok/s": (self.input_tokens + self.output_tokens) / seconds,
            "wall s": seconds,
        }

    def time_llm(self, llm: LLM, temperature: float, repeats: int) -> list[float]:
        """Seconds of several runs, after one that warms up; give the engine prefix caching off."""
        return [self.generate(llm, temperature) for _ in range(repeats + 1)][1:]

    def record(self, llm: LLM, temperature: float) -> list[StepRecord]:
        """What the steps of one run do, behind the timed ones: recording takes time of its own."""
        import torch

        from nano_vllm.step_record import ClockEvent, DeviceEvent, StepRecorder

        on_gpu = llm.engine.runner.device.type == "cuda"
        new_event: Callable[[], DeviceEvent] = (
            partial(torch.cuda.Event, enable_timing=True) if on_gpu else ClockEvent
        )
        recorder = StepRecorder(new_event)
        llm.engine.record_steps(recorder)
        self.generate(llm, temperature)
        llm.engine.record_steps(None)
        return recorder.records()

    def generate(self, llm: LLM, temperature: float) -> float:
        """Seconds of one run."""
        from nano_vllm.sampling_params import SamplingParams

        params = [
            SamplingParams(
                temperature=temperature, max_tokens=output_len, ignore_eos=True, detokenize=False
            )
            for output_len in self.output_lens
        ]
        start = time.perf_counter()
        outputs = llm.generate(self.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(o.outputs[0].token_ids) for o in outputs] == self.output_lens
        return seconds


def length_range(text: str) -> tuple[int, int]:
    """A command line's `64` or `100-1024`, as from and to."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like 64 or 100-1024, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def positive(text: str) -> int:
    """A command line's integer of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
