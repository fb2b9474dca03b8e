"""A device that is only a formula: how long a step takes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nano_vllm.batch import StepWork


@dataclass(frozen=True)
class Device:
    """Seconds of a step, in the manner of a roofline. The first two are about an H200's."""

    overhead: float
    weights: float
    """Reading them, while products are computed."""
    row: float
    context: float
    """A token that a decode attends over."""
    token: float
    pair: float
    prompts: float = 0.0
    """What the host adds to a step with a prompt."""

    def seconds(self, work: StepWork) -> float:
        num_tokens = work.num_decodes + work.prefill_tokens
        return (
            self.overhead
            + max(self.weights, self.token * num_tokens)
            + self.row * work.num_decodes
            + self.context * work.decode_context
            + self.pair * work.prefill_pairs
            + (self.prompts if work.prefill_tokens else 0.0)
        )


SMALL = Device(0.35e-3, 0.6e-3, 8e-6, 3.5e-8, 2.1e-6, 5.7e-10, 0.3e-3)
LARGE = Device(0.4e-3, 4.5e-3, 8e-6, 4.5e-8, 17e-6, 1.5e-9, 0.3e-3)
CPU = Device(2e-3, 18e-3, 1e-3, 2e-6, 1.9e-3, 2e-7)


class Noise:
    """What a step takes in fact.

    Args:
        draw: randomness.
        outliers: share of the steps that take a hundred times as long.
        slow: share of the steps that take a sixth longer.
    """

    SLOWEST = 1.07
    """One step in a hundred takes longer than so many times what it should."""

    def __init__(self, draw: random.Random, outliers: float = 0.0, slow: float = 0.0) -> None:
        self._draw = draw
        self._outliers = outliers
        self._slow = slow

    def __call__(self, seconds: float) -> float:
        held_up = self._draw.random() < self._outliers
        if self._slow and self._draw.random() < self._slow:
            seconds *= 7 / 6
        return seconds * max(self._draw.gauss(1.0, 0.03), 0.5) * (100.0 if held_up else 1.0)


def prefill(num_decodes: int, decode_context: int, computed: int, num_tokens: int) -> StepWork:
    """A step with a chunk of a prompt of which so much is computed."""
    pairs = num_tokens * computed + num_tokens * (num_tokens + 1) // 2
    return StepWork(num_decodes, decode_context, num_tokens, pairs)
