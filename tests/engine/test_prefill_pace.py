"""What streams notice of a long prompt, on an engine whose device takes simulated time."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nano_vllm.batch import Batch, StepResult, StepWork
from nano_vllm.bench.replay import Replay, Trace
from nano_vllm.config import EngineConfig
from nano_vllm.engine.engine import Engine
from nano_vllm.runner.graph_shapes import token_sizes
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import FakeRunner
from tests.engine.simulated_device import LARGE, SMALL, Device, Noise

BUDGET = 8192
LONG = 32_768


class SimulatedRunner(FakeRunner):
    """Every token is the same, and time goes by as on a device, which takes its steps in turn."""

    def __init__(self, device: Device, padded_tokens: tuple[int, ...] = (), **options: Any) -> None:
        super().__init__(
            num_blocks=16_384,
            block_size=16,
            max_model_len=40_000,
            max_num_batched_tokens=BUDGET,
            **options,
        )
        self.padded_tokens = padded_tokens
        self.now = 0.0
        self.works: list[StepWork] = []
        self._device = device
        self._noise = Noise(random.Random(0))
        self._ready = 0.0

    def launch(self, batch: Batch) -> SimpleNamespace:
        num_decodes = batch.num_decodes
        rows = [(batch.start(row), s.num_tokens) for row, s in enumerate(batch.scheduled)]
        work = StepWork(
            num_decodes,
            sum(computed + num for computed, num in rows[:num_decodes]),
            sum(num for _, num in rows[num_decodes:]),
            sum(num * computed + num * (num + 1) // 2 for computed, num in rows[num_decodes:]),
        )
        self.works.append(work)
        start = max(self.now, self._ready)
        self._ready = ready = start + self._noise(self._device.seconds(self._padded(work)))
        result = StepResult([1 if s.samples else -1 for s in batch.scheduled])

        def wait() -> StepResult:
            self.now = max(self.now, ready)
            return result

        return SimpleNamespace(result=wait)

    def _padded(self, work: StepWork) -> StepWork:
        total = work.num_decodes + work.prefill_tokens
        sizes = [size for size in self.padded_tokens if size >= total]
        if not work.prefill_tokens or not sizes:
            return work
        return work._replace(prefill_tokens=sizes[0] - work.num_decodes)


class Bench:
    """An engine with requests that decode."""

    def __init__(
        self,
        device: Device,
        num_streams: int,
        stream: bool = True,
        padded_tokens: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        self.runner = SimulatedRunner(device, padded_tokens)
        config = EngineConfig(enable_prefix_caching=False, **options)
        self.engine = Engine(config, self.runner, clock=lambda: self.runner.now)
        for index in range(num_streams):
            self.add(f"s{index}", 400 + 13 * index, stream=stream)
        self.gaps(lambda: self.engine.scheduler.num_running < num_streams)
        self.steps(200)

    def add(self, name: str, length: int, stream: bool = False, max_tokens: int = 5000) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(name, [7] * length, params, stream=stream)

    def gaps(self, goes_on: Any) -> list[float]:
        """Seconds between results, while it goes on."""
        found = []
        while goes_on() and self.engine.has_work:
            before = self.runner.now
            self.engine.step()
            found.append(self.runner.now - before)
        return found

    def steps(self, count: int) -> list[float]:
        """The gaps of so many launches."""
        stop = len(self.runner.works) + count
        return self.gaps(lambda: len(self.runner.works) < stop)

    def prompt(self, name: str, length: int = LONG) -> tuple[list[float], list[StepWork]]:
        """The gaps while a prompt is computed, and the steps that it is in."""
        self.add(name, length, max_tokens=1)
        first = len(self.runner.works)
        scheduler = self.engine.scheduler
        num_others = scheduler.num_running
        self.engine.step()
        gaps = self.gaps(lambda: scheduler.num_waiting or scheduler.num_running > num_others)
        return gaps, [work for work in self.runner.works[first:] if work.prefill_tokens]


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


@pytest.mark.parametrize("device", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("num_streams", [1, 8, 64])
def test_a_long_prompt_at_most_halves_the_pace_of_streams(device: Device, num_streams: int) -> None:
    bench = Bench(device, num_streams)
    bench.prompt("first")
    before = bench.steps(200)
    gaps, _ = bench.prompt("second")
    after = bench.steps(200)
    # The contexts of the streams grow meanwhile.
    idle = (p99(before) + p99(after)) / 2
    assert p99(gaps) <= 2.0 * idle
    assert p99(gaps) > 1.7 * idle


@pytest.mark.parametrize("num_streams", [1, 8, 64])
def test_steps_with_prompts_fill_what_they_are_padded_to(num_streams: int) -> None:
    sizes = tuple(token_sizes(BUDGET))
    bench = Bench(LARGE, num_streams, padded_tokens=sizes)
    bench.prompt("first")
    before = bench.steps(200)
    gaps, works = bench.prompt("second")
    after = bench.steps(200)
    assert p99(gaps) <= 1.0 * (p99(before) + p99(after))
    totals = [work.num_decodes + work.prefill_tokens for work in works[:-1]]
    assert set(totals) <= set(sizes)
    assert len(set(totals)) > 1


@pytest.mark.parametrize("num_streams", [1, 64])
def test_a_promise_in_milliseconds(num_streams: int) -> None:
    bench = Bench(LARGE, num_streams, itl_slo=30)
    bench.prompt("first")
    gaps, _ = bench.prompt("second")
    assert p99(gaps) <= 0.030 * 1.03
    assert statistics.median(gaps) > 0.026


@pytest.mark.parametrize("options", [{"itl_slo": 0}, {"stream": False}], ids=["none", "offline"])
def test_chunks_are_full_without_a_promise_and_without_streams(options: dict[str, Any]) -> None:
    bench = Bench(SMALL, 8, **options)
    gaps, works = bench.prompt("long")
    assert [work.prefill_tokens for work in works][:-1] == [BUDGET - 8] * (LONG // BUDGET)
    assert p99(gaps) > 5 * p99(bench.steps(200))


def test_a_prompt_alone_is_computed_in_full_chunks() -> None:
    bench = Bench(SMALL, 0)
    _, works = bench.prompt("long")
    assert [work.prefill_tokens for work in works] == [BUDGET] * (LONG // BUDGET)


class Observed:
    """What the pace of an engine is told."""

    def __init__(self, engine: Engine) -> None:
        self.works: list[StepWork] = []
        self.seconds: list[float] = []
        pace = engine.scheduler.prefill_pace
        assert pace is not None
        self._observe = pace.observe
        pace.observe = self  # type: ignore[method-assign, assignment]

    def __call__(self, work: StepWork, seconds: float) -> None:
        self.works.append(work)
        self.seconds.append(seconds)
        self._observe(work, seconds)


def test_the_pace_is_told_what_the_device_did() -> None:
    bench = Bench(SMALL, 8)
    observed = Observed(bench.engine)
    first = len(bench.runner.works) - 1  # one was launched ahead
    bench.prompt("a", 3000)
    bench.steps(20)
    done = bench.runner.works[first : first + len(observed.works)]
    assert sum(work.prefill_tokens for work in done) == 3000
    for work, told in zip(done, observed.works, strict=True):
        assert told._replace(decode_context=0) == work._replace(decode_context=0)
        assert abs(told.decode_context - work.decode_context) <= 17 * work.num_decodes


@pytest.mark.parametrize("aborts", [True, False])
def test_pauses_are_no_steps(aborts: bool) -> None:
    """Neither is the step that was launched ahead of a pause and waits for its end."""
    bench = Bench(SMALL, 1)
    observed = Observed(bench.engine)
    bench.engine.abort("s0")
    for number in range(5):
        bench.runner.now += 3600.0
        bench.add(f"a{number}", 400, stream=True, max_tokens=20)
        bench.steps(10 if aborts else 100)
        bench.engine.abort(f"a{number}")
        assert not bench.engine.has_work
    assert len(observed.seconds) > 40
    assert min(observed.seconds) > 0.5e-3
    assert max(observed.seconds) < 5e-3


def test_a_cached_prefix_counts_as_context() -> None:
    """A chunk behind it costs more than one at the start of a prompt."""
    chunks = {}
    for cached in (0, LONG):
        bench = Bench(SMALL, 8)
        bench.engine.scheduler.block_manager.enable_prefix_caching = True
        bench.prompt("first")
        bench.steps(200)
        if cached:
            bench.add("second", LONG + 4096, max_tokens=1)
        else:
            bench.engine.add_request("second", [8] * (LONG + 4096), SamplingParams(max_tokens=1))
        works = bench.runner.works
        while not works[-1].prefill_tokens:
            bench.engine.step()
        chunks[cached] = works[-1]
    assert chunks[LONG].prefill_pairs > LONG * chunks[LONG].prefill_tokens
    assert chunks[LONG].prefill_tokens < 0.7 * chunks[0].prefill_tokens


def test_a_recorded_pace_is_kept_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    bench = Bench(SMALL, 2, record=str(path))
    bench.prompt("a", 3000)
    bench.engine.close()
    trace = Trace(str(path))
    replay = Replay(trace.header)
    for number, event in enumerate(trace.events(), 1):
        replay.check(number, event)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_promises_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=f"itl_slo must be milliseconds, 0 or more, got {value}"):
        EngineConfig(itl_slo=value)


def test_a_promise_needs_chunks() -> None:
    with pytest.raises(ValueError, match=r"itl_slo = 30.0 needs enable_chunked_prefill"):
        EngineConfig(itl_slo=30.0, enable_chunked_prefill=False)
