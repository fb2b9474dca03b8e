"""What a step is thought to take, and the pace that comes of it, on simulated devices."""

from __future__ import annotations

import math
import random

import pytest

from nano_vllm.batch import StepWork
from nano_vllm.engine.prefill_pace import PrefillPace
from nano_vllm.engine.step_cost import MIN_PREFILL_TOKENS, StepCost
from tests.engine.simulated_device import CPU, LARGE, SMALL, Device, Noise, prefill

BUDGET = 8192
DEVICES = {"small": SMALL, "large": LARGE, "cpu": CPU}


def draw_work(draw: random.Random, device: Device) -> StepWork:
    num_decodes = draw.randint(1, 64)
    context = sum(draw.randint(100, 4000) for _ in range(num_decodes))
    if draw.random() < 0.5:
        return StepWork(num_decodes, context, 0, 0)
    most = 64 if device is CPU else 2048
    return prefill(num_decodes, context, draw.randint(0, 8000), draw.randint(most // 8, most))


def errors(cost: StepCost, draw: random.Random, device: Device) -> list[float]:
    works = [draw_work(draw, device) for _ in range(200)]
    return sorted(abs(cost.predict(work) / device.seconds(work) - 1.0) for work in works)


@pytest.mark.parametrize("name", DEVICES)
def test_predictions_after_200_steps_and_after_the_device_changed(name: str) -> None:
    draw, device, cost = random.Random(0), DEVICES[name], StepCost()
    noise = Noise(draw, outliers=0.01)
    for factor in (1.0, 2.0, 0.7):
        changed = Device(*(factor * value for value in vars(device).values()))
        for _ in range(200):
            work = draw_work(draw, device)
            cost.observe(work, noise(changed.seconds(work)))
        found = errors(cost, draw, changed)
        assert found[int(0.9 * len(found))] < 0.1


def test_one_step_held_up_changes_little() -> None:
    cost, work, mixed = StepCost(), StepWork(8, 8000, 0, 0), prefill(8, 8000, 1000, 256)
    for _ in range(50):
        cost.observe(work, 1e-3)
        cost.observe(mixed, 2e-3)
    cost.observe(work, 100e-3)
    cost.observe(mixed, 200e-3)
    for nothing in (0.0, -1.0, math.nan, math.inf):
        cost.observe(work, nothing)
    assert cost.predict(work) == pytest.approx(1e-3, rel=0.05)
    assert cost.predict(mixed) == pytest.approx(2e-3, rel=0.05)


def test_hours_of_decodes_do_not_wash_away_what_a_prompt_costs() -> None:
    draw, cost = random.Random(0), StepCost()
    for _ in range(200):
        work = draw_work(draw, SMALL)
        cost.observe(work, SMALL.seconds(work))
    chunk = cost.max_prefill_tokens(5e-3, 8, 8000, 0)
    for _ in range(20_000):
        cost.observe(StepWork(8, 8000, 0, 0), SMALL.seconds(StepWork(8, 8000, 0, 0)))
    assert cost.max_prefill_tokens(5e-3, 8, 8000, 0) == pytest.approx(chunk, rel=0.1)


@pytest.mark.parametrize("num_steps", [0, 1, 10, 200])
def test_chunks_grow_with_the_limit_and_shrink_with_the_context(num_steps: int) -> None:
    draw, cost = random.Random(1), StepCost()
    noise = Noise(draw, outliers=0.05)
    for _ in range(num_steps):
        work = draw_work(draw, LARGE)
        cost.observe(work, noise(LARGE.seconds(work)))
    limits = [0.0, *(1e-3 * 1.3**i for i in range(30)), 1e9]
    chunks = [cost.max_prefill_tokens(limit, 16, 30_000, 2000) for limit in limits]
    assert chunks == sorted(chunks)
    assert MIN_PREFILL_TOKENS <= chunks[0] < chunks[-1]
    contexts = [0, 100, 1000, 10_000, 100_000]
    for limit in (0.0, 8e-3, 80e-3):
        chunks = [cost.max_prefill_tokens(limit, 16, 30_000, context) for context in contexts]
        assert chunks == sorted(chunks, reverse=True)


def test_no_step_of_a_known_device_is_over_the_limit_it_was_made_for() -> None:
    draw, cost = random.Random(2), StepCost()
    for _ in range(300):
        work = draw_work(draw, SMALL)
        cost.observe(work, SMALL.seconds(work))
    for limit in (4e-3, 6e-3):
        for context in (0, 1000, 8000):
            chunk = cost.max_prefill_tokens(limit, 16, 30_000, context)
            assert cost.predict(prefill(16, 30_000, context, chunk)) <= limit
            assert cost.predict(prefill(16, 30_000, context, chunk + 2)) > limit


def test_the_first_prompt_is_careful_and_goes_on() -> None:
    assert 16 <= PrefillPace().max_prefill_tokens(1, 100, 0) <= 64
    assert 16 <= PrefillPace(0.03).max_prefill_tokens(1, 100, 0) <= 64


def test_a_limit_out_of_reach_costs_a_tenth_and_does_not_stop_prompts() -> None:
    pace = PrefillPace(1e-3)
    context = 0
    for _ in range(300):
        chunk = pace.max_prefill_tokens(8, 8000, context)
        work = prefill(8, 8000, context, chunk)
        pace.observe(work, LARGE.seconds(work))
        context += chunk
    assert context > 300 * 32
    chunk = pace.max_prefill_tokens(8, 8000, context)
    idle = LARGE.seconds(StepWork(8, 8000, 0, 0)) + LARGE.prompts
    assert LARGE.seconds(prefill(8, 8000, context, chunk)) < 1.2 * idle


def test_now_and_then_a_step_shows_what_decodes_take_by_now() -> None:
    """Else streams that came during a long prompt would be held to the pace of those before."""
    pace = PrefillPace()
    for _ in range(100):
        pace.observe(StepWork(1, 1000, 0, 0), CPU.seconds(StepWork(1, 1000, 0, 0)))
    chunks = []
    for _ in range(200):
        chunks.append(pace.max_prefill_tokens(40, 40_000, 500))
        work = prefill(40, 40_000, 500, chunks[-1])
        pace.observe(work, CPU.seconds(work))
    assert 0 < chunks.count(0) < 20
    decodes = CPU.seconds(StepWork(40, 40_000, 0, 0))
    assert pace.cost.predict(StepWork(40, 40_000, 0, 0)) == pytest.approx(decodes, rel=0.1)


class Serving:
    """Streams that decode on a device, and prompts that join them."""

    def __init__(
        self,
        device: Device,
        num_streams: int,
        context: int,
        limit: float | None,
        seed: int,
        slow: float = 0.0,
    ) -> None:
        self.device, self.limit = device, limit
        self.pace = PrefillPace(limit)
        self.num_streams, self.context = num_streams, num_streams * context
        self.noise = Noise(random.Random(seed), slow=slow)
        self.outlier = Noise(random.Random(seed + 1), outliers=0.003)

    def step(self, computed: int = 0, num_tokens: int = 0) -> float:
        """A step; what it takes if nothing holds it up."""
        work = prefill(self.num_streams, self.context, computed, num_tokens)
        seconds = self.noise(self.device.seconds(work))
        held_up = self.outlier(1.0) > 2.0
        self.pace.observe(work, 100.0 * seconds if held_up else seconds)
        return seconds

    def prompt(self, length: int) -> tuple[list[float], float]:
        """The steps' times as shares of what is promised of each, and the time in which as many
        tokens go by with the largest chunks of which all but one in a hundred keep the promise,
        over that of these.
        """
        shares, took = [], 0.0
        computed = 0
        while computed < length:
            chunk = self.pace.max_prefill_tokens(self.num_streams, self.context, computed)
            chunk = min(chunk, BUDGET - self.num_streams, length - computed)
            seconds = self.step(computed, chunk)
            shares.append(seconds / self.promise())
            took += seconds
            computed += chunk
        best, computed = 0.0, 0
        while computed < length:
            chunk = self.best_chunk(computed, length)
            best += self.device.seconds(prefill(self.num_streams, self.context, computed, chunk))
            computed += chunk
        return shares, best / took

    def promise(self) -> float:
        return self.limit or 2 * self.device.seconds(prefill(self.num_streams, self.context, 0, 0))

    def best_chunk(self, computed: int, length: int) -> int:
        low, high = 1, min(BUDGET - self.num_streams, length - computed)
        while low < high:
            chunk = (low + high + 1) // 2
            work = prefill(self.num_streams, self.context, computed, chunk)
            fits = Noise.SLOWEST * self.device.seconds(work) <= self.promise()
            low, high = (chunk, high) if fits else (low, chunk - 1)
        return low


@pytest.mark.parametrize("limit", [None, 0.03, 0.1])
@pytest.mark.parametrize(
    ("num_streams", "context"),
    [(1, 100), (1, 20_000), (8, 1000), (64, 500), (64, 4000), (256, 300), (256, 2000)],
)
@pytest.mark.parametrize("name", DEVICES)
def test_the_promise_is_kept_and_prompts_get_what_it_leaves(
    name: str, num_streams: int, context: int, limit: float | None
) -> None:
    device = DEVICES[name]
    length = 8192 if device is CPU else 32_768
    idle = device.seconds(prefill(num_streams, num_streams * context, 0, 0))
    if limit is not None and limit < 1.2 * idle:
        # No chunk keeps this promise: prompts go on all the same.
        pace = PrefillPace(limit)
        for _ in range(50):
            pace.observe(StepWork(num_streams, num_streams * context, 0, 0), idle)
        most = pace.max_prefill_tokens(num_streams, num_streams * context, 0)
        assert MIN_PREFILL_TOKENS <= most < 8192
        return
    shares: list[float] = []
    throughput = 0.0
    for seed in range(3):
        serving = Serving(device, num_streams, context, limit, seed)
        serving.step(0, 512)
        for _ in range(200):
            serving.step()
        serving.prompt(length)
        for _ in range(50):
            serving.step()
        found, share = serving.prompt(length)
        shares += found
        throughput += share / 3
    assert sorted(shares)[int(0.99 * len(shares))] <= 1.03
    assert throughput >= 0.8


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("num_streams", [8, 32])
def test_the_promise_is_kept_where_some_steps_are_slow(name: str, num_streams: int) -> None:
    shares: list[float] = []
    for seed in range(3):
        serving = Serving(DEVICES[name], num_streams, 300, None, seed, slow=0.03)
        for _ in range(200):
            serving.step()
        serving.prompt(32_768)
        shares += serving.prompt(32_768)[0]
    assert sorted(shares)[int(0.99 * len(shares))] <= 1.03


@pytest.mark.parametrize("held_up", [1, 3])
def test_first_steps_that_load_what_they_run_do_not_make_prompts_dear(held_up: int) -> None:
    """The first prompts of a process take a hundred times what they do later."""
    pace, done, num_steps = PrefillPace(), 0, 0
    for _ in range(held_up):
        pace.observe(prefill(0, 0, 0, 512), 0.46)
    for _ in range(200):
        pace.observe(StepWork(1, 600, 0, 0), SMALL.seconds(StepWork(1, 600, 0, 0)))
    while done < 8000:
        work = prefill(1, 600, done, pace.max_prefill_tokens(1, 600, done))
        pace.observe(work, SMALL.seconds(work))
        done += work.prefill_tokens
        num_steps += 1
    assert num_steps < 80


def test_a_prompt_takes_many_tokens_where_few_cost_as_much() -> None:
    """Far behind in a long prompt on a large device: attention takes so long for any part of it
    that the promise cannot be kept, and streams wait the least if it is soon done.
    """
    pace, done, num_steps = PrefillPace(None, saturating_tokens=64), 0, 0
    assert pace.cost.pairs(8, 1000) == 64 * 1000 + 8 * 9 // 2
    assert pace.cost.pairs(100, 1000) == 100 * 1000 + 100 * 101 // 2
    for _ in range(200):
        pace.observe(StepWork(1, 600, 0, 0), SMALL.seconds(StepWork(1, 600, 0, 0)))
    base = SMALL.seconds(StepWork(1, 600, 0, 0))
    longest = 0.0
    while done < 32_000:
        chunk = pace.max_prefill_tokens(1, 600, done)
        work = StepWork(1, 600, chunk, pace.cost.pairs(chunk, done) if chunk else 0)
        pace.observe(work, SMALL.seconds(work))
        longest = max(longest, SMALL.seconds(work))
        done += chunk
        num_steps += 1
    by_any = SMALL.seconds(StepWork(1, 600, 1, pace.cost.pairs(1, 32_000))) - base
    assert longest < 1.02 * (base + 1.25 * by_any)
    assert num_steps < 500


def test_a_step_costs_what_it_is_padded_to() -> None:
    sizes = (64, 128, 256, 512)
    pace = PrefillPace(0.012, padded=sizes)
    for tokens in range(24, 504, 4):
        size = next(size for size in sizes if size >= tokens + 8)
        pace.observe(StepWork(8, 800, tokens, 0), 0.005 + 4e-5 * (size - 8))
        pace.observe(StepWork(8, 800, 0, 0), 0.005)
    for size in sizes:
        seconds = pace.cost.predict(StepWork(8, 800, size - 8, 0))
        assert seconds == pytest.approx(0.005 + 4e-5 * (size - 8), rel=0.02)
    free = PrefillPace(0.012)
    free.cost = pace.cost
    assert 128 + 8 < free.max_prefill_tokens(8, 800, 0) + 8 < 256
    assert pace.max_prefill_tokens(8, 800, 0) + 8 == 128
    # To come down to a size may not cost more than half.
    assert 2 * (256 - 200) < pace.max_prefill_tokens(200, 800, 0) < 512 - 200


def test_parts_that_are_spread_are_no_longer_than_can_be() -> None:
    pace, free = PrefillPace(1.0, spread=(2048, 256)), PrefillPace(1.0)
    for each in (pace, free):
        for tokens in (100, 200, 400, 800):
            for context in (0, 2000, 4000):
                pairs = each.cost.pairs(tokens, context)
                each.observe(StepWork(8, 800, tokens, pairs), 0.005 + 1e-5 * tokens)
    assert free.max_prefill_tokens(8, 800, 3000) > 256
    assert pace.max_prefill_tokens(8, 800, 3000) == 256
    assert pace.max_prefill_tokens(8, 800, 2047) > 256
