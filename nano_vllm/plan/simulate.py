"""Step times and throughput of layouts of GPUs, by the model of `step_time` and a pipeline that is
as full as its batch allows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from nano_vllm.plan.communication import send_seconds
from nano_vllm.plan.fit import Fit, fit, layouts
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.plan.step_time import StepTime, decode_step, prefill_step


@dataclass(frozen=True)
class Decode:
    """One replica that decodes."""

    layout: Layout
    batch: int
    """Sequences of the replica, in all micro-batches."""
    seconds: float
    """Until each sequence has its next token (TPOT)."""
    bubble: float
    """Share of the GPUs' time in which they wait for other stages."""
    collectives: float
    """Share of a stage's step that its all-reduces take."""

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


@dataclass(frozen=True)
class Cluster:
    """Replicas of a layout on a number of GPUs."""

    num_gpus: int
    dp: int
    decode: Decode

    @property
    def tokens_per_second(self) -> float:
        return self.dp * self.decode.tokens_per_second


@dataclass
class Simulation:
    """All layouts of a setup at one context length; what is computed is kept."""

    setup: Setup
    context: int
    """Tokens of each sequence while it decodes."""
    max_gpus: int
    _fits: dict[Layout, Fit] = field(default_factory=dict)
    _decodes: dict[tuple[Layout, int], Decode] = field(default_factory=dict)

    def fit(self, layout: Layout) -> Fit:
        """Where the memory goes."""
        if layout not in self._fits:
            self._fits[layout] = fit(self.setup, layout, self.context)
        return self._fits[layout]

    def max_batch(self, layout: Layout) -> int:
        """Sequences of the context that a replica holds and may run; 0 where it does not fit."""
        found = self.fit(layout)
        return min(found.max_concurrency, self.setup.config.max_num_seqs) if found.fits else 0

    def decode(self, layout: Layout, batch: int) -> Decode:
        """Of a replica; a batch is cut into as many micro-batches as there are stages, as far as
        there are sequences.
        """
        key = (layout, batch)
        if key not in self._decodes:
            self._decodes[key] = self._decode(layout, batch)
        return self._decodes[key]

    def _decode(self, layout: Layout, batch: int) -> Decode:
        num_micro_batches = min(layout.pp, batch)
        rows = -(-batch // num_micro_batches)
        steps = [
            decode_step(self.setup, stage, rows, self.context, layout.tp)
            for stage in self.fit(layout).stages
        ]
        hop = rows * self.setup.model.hidden_size * self.setup.itemsize
        slowest = max(step.total for step in steps)
        once_through = sum(step.total for step in steps) + self._sends(layout, hop)
        seconds = max(num_micro_batches * slowest, once_through)
        busy = num_micro_batches * sum(step.total for step in steps)
        return Decode(
            layout,
            batch,
            seconds,
            1 - busy / (layout.pp * seconds),
            _share_of_collectives(steps),
        )

    def prefill_tokens_per_second(self, layout: Layout, prompt_len: int) -> float:
        """Of a replica whose stages are all busy with prompts."""
        tokens = self.setup.max_num_batched_tokens
        slowest = max(
            prefill_step(self.setup, stage, tokens, prompt_len, layout.tp).total
            for stage in self.fit(layout).stages
        )
        return tokens / slowest

    def layouts(self) -> Iterator[Layout]:
        """Those that hold a sequence."""
        every = layouts(self.setup, self.max_gpus)
        return (layout for layout in every if self.max_batch(layout))

    def best(self, num_gpus: int, max_seconds: float) -> Cluster | None:
        """The replicas with the most tokens per second of those that keep the time per output
        token; None where no layout does.
        """
        clusters = [
            Cluster(num_gpus, num_gpus // layout.num_gpus, self.decode(layout, batch))
            for layout in self.layouts()
            if num_gpus % layout.num_gpus == 0 and (batch := self._widest(layout, max_seconds))
        ]
        return max(clusters, key=lambda c: (c.tokens_per_second, -c.decode.seconds), default=None)

    def _widest(self, layout: Layout, max_seconds: float) -> int:
        """Sequences of the largest batch that keeps the time per output token; 0 where none does.
        Times grow with the batch.
        """
        sizes = range(1, self.max_batch(layout) + 1)
        return bisect_right(sizes, max_seconds, key=lambda size: self.decode(layout, size).seconds)

    def quickest(self, num_gpus: int) -> Cluster | None:
        """The layout with the least time per output token of a single sequence."""
        clusters = [
            Cluster(num_gpus, num_gpus // layout.num_gpus, self.decode(layout, 1))
            for layout in self.layouts()
            if num_gpus % layout.num_gpus == 0
        ]
        return min(clusters, key=lambda c: c.decode.seconds, default=None)

    def _sends(self, layout: Layout, num_bytes: int) -> float:
        """From stage to stage, and of the tokens back to the first."""
        if layout.pp == 1:
            return 0.0
        links, here = self.setup.gpu.links, self.setup.gpus_per_host
        hosts = [stage * layout.tp // here for stage in range(layout.pp)]
        back = send_seconds(links, 0, hosts[-1] != hosts[0])
        return back + sum(send_seconds(links, num_bytes, a != b) for a, b in pairwise(hosts))


def batches(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    powers = [1 << i for i in range(largest.bit_length())]
    return [size for size in powers if size < largest] + [largest] * (largest > 0)


def _share_of_collectives(steps: list[StepTime]) -> float:
    return sum(step.collectives for step in steps) / sum(step.total for step in steps)
