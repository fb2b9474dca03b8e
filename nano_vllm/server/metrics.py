"""Prometheus metrics, under vLLM's names where it has them."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nano_vllm.engine.messages import Pong, RequestDelta
from nano_vllm.server.answer import Answer

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
LONG_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
COUNTS = (1, 2, 5, 10, 20, 50, 100)


class ServerMetrics:
    """What the server counts, and what the engine last said of itself.

    Args:
        model_name: the label of all.
        num_engines: replicas, which the label `engine` numbers from 0.
    """

    def __init__(self, model_name: str, num_engines: int = 1) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name)
        self._registry.register(self._engine)
        ProcessCollector(registry=self._registry)  # memory and file descriptors of the API process
        tasks = Gauge(
            "nano_vllm:tasks",
            "Tasks of the API process's event loop.",
            ["model_name"],
            registry=self._registry,
        ).labels(model_name)
        tasks.set_function(_num_tasks)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> list[_Histogram]:
            engines = [_Histogram(buckets) for _ in range(num_engines)]
            self._registry.register(_HistogramCollector(f"vllm:{name}", text, model_name, engines))
            return engines

        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "Time to first token.", SECONDS
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Mean time between tokens of a request.", TOKEN_SECONDS
        )
        self._per_output_token = histogram(
            "request_time_per_output_token_seconds", "Time per output token.", TOKEN_SECONDS
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "Time from arrival to the last token.", LONG_SECONDS
        )
        self._queue = histogram("request_queue_time_seconds", "Time in the queue.", LONG_SECONDS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", LONG_SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the last.", LONG_SECONDS
        )
        self._inference = histogram(
            "request_inference_time_seconds", "From the first step to the last.", LONG_SECONDS
        )
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of prompts.", TOKENS)
        self._output_tokens = histogram("request_generation_tokens", "Tokens generated.", TOKENS)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens.", TOKENS)
        self._n = histogram("request_params_n", "n.", COUNTS)
        self._success = Counter(
            "vllm:request_success",
            "Prompts that ended, by the reason of their first completion.",
            ["model_name", "engine", "finished_reason"],
            registry=self._registry,
        )
        self.refused = Counter(
            "nano_vllm:requests_refused",
            "Requests that found the queue full.",
            ["model_name"],
            registry=self._registry,
        ).labels(model_name)
        self._model_name = model_name

    def observe(self, answer: Answer, place: int, delta: RequestDelta, engine: int = 0) -> None:
        """Count a prompt that ended in an engine."""
        prompt, times = answer.prompts[place], delta.metrics
        if not prompt.needs_engine or times is None:
            return
        num_tokens = answer.output_tokens[place]
        reason = delta.completions[0].finish_reason if delta.completions else None
        self._success.labels(self._model_name, str(engine), reason or "abort").inc()
        self._prompt_tokens[engine].observe(len(prompt.token_ids))
        self._output_tokens[engine].observe(num_tokens)
        self._max_tokens[engine].observe(prompt.max_tokens)
        self._n[engine].observe(prompt.params.n)
        start, end = times.arrival_time, times.finished_time
        first, scheduled = times.first_token_time, times.first_scheduled_time
        if first is None or scheduled is None or end is None:
            return
        self._time_to_first_token[engine].observe(first - start)
        self._queue[engine].observe(scheduled - start)
        self._prefill[engine].observe(first - scheduled)
        self._decode[engine].observe(end - first)
        self._inference[engine].observe(end - scheduled)
        self._e2e[engine].observe(end - start)
        if num_tokens > prompt.params.n:
            per_token = (end - first) / (num_tokens / prompt.params.n - 1)
            self._per_output_token[engine].observe(per_token)
            self._inter_token[engine].observe(per_token)

    def page(self, pongs: Sequence[Pong | None]) -> bytes:
        """All of it in Prometheus's text format.

        Args:
            pongs: each engine's last sign of life.
        """
        self._engine.pongs = pongs
        return generate_latest(self._registry)


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # outside of an event loop
        return 0


class _Histogram:
    """Values by bucket: a request has twelve, of which the library's own class makes slow work.

    Args:
        bounds: upper ends of the buckets, rising.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class _HistogramCollector(Collector):
    def __init__(
        self, name: str, text: str, model_name: str, engines: Sequence[_Histogram]
    ) -> None:
        self._name = name
        self._text = text
        self._model_name = model_name
        self._engines = engines

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name", "engine"])
        for engine, histogram in enumerate(self._engines):
            bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
            counts = accumulate(histogram.counts)
            family.add_metric(
                [self._model_name, str(engine)],
                buckets=list(zip(bounds, counts, strict=True)),
                sum_value=histogram.total,
            )
        yield family


class _EngineCollector(Collector):
    """The engines' own figures, as they were a second ago at the most."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.pongs: Sequence[Pong | None] = []

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for engine, pong in enumerate(self.pongs):
            if pong is None:
                continue
            labels = [self._model_name, str(engine)]
            for kind, figures in ((GaugeMetricFamily, _gauges), (CounterMetricFamily, _counters)):
                for name, (text, value) in figures(pong).items():
                    if name not in families:
                        families[name] = kind(name, text, labels=["model_name", "engine"])
                    families[name].add_metric(labels, value)
            blocks = families.setdefault(
                "nano_vllm:kv_blocks",
                GaugeMetricFamily(
                    "nano_vllm:kv_blocks",
                    "KV blocks by state.",
                    labels=["model_name", "engine", "state"],
                ),
            )
            for state, count in _blocks_by_state(pong).items():
                blocks.add_metric([*labels, state], count)
        yield from families.values()


def _gauges(pong: Pong) -> dict[str, tuple[str, float]]:
    metrics = pong.metrics
    num_used = metrics.num_blocks - metrics.num_free_blocks
    return {
        "vllm:num_requests_running": ("Sequences that hold blocks.", metrics.num_running),
        "vllm:num_requests_waiting": ("Sequences that wait.", metrics.num_waiting),
        "vllm:kv_cache_usage_perc": (
            "Share of the KV blocks that are held.",
            num_used / max(metrics.num_blocks, 1),
        ),
    }


def _counters(pong: Pong) -> dict[str, tuple[str, float]]:
    metrics = pong.metrics
    return {
        "vllm:num_preemptions": ("Preemptions.", metrics.num_preemptions),
        "vllm:prompt_tokens": ("Prompt tokens of ended requests.", metrics.num_prompt_tokens),
        "vllm:generation_tokens": ("Tokens generated.", metrics.num_output_tokens),
        "vllm:prefix_cache_queries": (
            "Prompt tokens looked up in the prefix cache.",
            metrics.num_prompt_tokens,
        ),
        "vllm:prefix_cache_hits": (
            "Prompt tokens that came from the prefix cache.",
            metrics.num_cached_tokens,
        ),
        "nano_vllm:loaded_tokens": (
            "Tokens whose blocks came back from host memory.",
            metrics.num_loaded_tokens,
        ),
        "nano_vllm:leaked_blocks": (
            "References to blocks that were lost and taken back; should be 0.",
            metrics.num_leaked_blocks,
        ),
        "nano_vllm:steps": ("Steps of the engine.", metrics.num_steps),
        "nano_vllm:step_seconds": ("Time in steps.", pong.step_seconds),
        "nano_vllm:step_gap_seconds": (
            "Host time between steps that follow one another.",
            pong.host_seconds,
        ),
    }


def _blocks_by_state(pong: Pong) -> dict[str, int]:
    metrics = pong.metrics
    return {
        "active": metrics.num_blocks - metrics.num_free_blocks,
        "cached": pong.num_cached_blocks,
        "free": metrics.num_free_blocks - pong.num_cached_blocks,
    }
