"""Prometheus metrics, from requests made up."""

from __future__ import annotations

import re

import pytest

from nano_vllm.engine.messages import CompletionDelta, Pong, RequestDelta
from nano_vllm.metrics import EngineMetrics
from nano_vllm.outputs import RequestMetrics
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.server.completions import CompletionAnswer
from nano_vllm.server.metrics import ServerMetrics
from nano_vllm.server.protocol import CompletionRequest
from nano_vllm.server.validation import GatedPrompt


def value(page: bytes, name: str) -> float:
    (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", page.decode(), re.M)
    return float(found)


def test_each_prompt_counts_its_own_tokens_and_times() -> None:
    prompts = [GatedPrompt(None, [1] * length, SamplingParams(), 16) for length in (3, 4)]
    answer = CompletionAnswer(CompletionRequest(prompt="a"), prompts, "m", None)
    metrics = ServerMetrics("m")
    times = RequestMetrics(10.0, 10.5, 11.5, 13.5)
    for place, num_tokens in ((0, 5), (1, 9)):
        first = CompletionDelta(0, "a", [1])
        answer.note(place, RequestDelta("a", [first], False))
        rest = CompletionDelta(0, "b", [1] * (num_tokens - 1), None, "length")
        last = RequestDelta("a", [rest], True, times)
        answer.note(place, last)
        metrics.observe(answer, place, last)
    page = metrics.page([None])
    expected = {
        "request_generation_tokens_sum": 14,
        "request_prompt_tokens_sum": 7,
        "time_to_first_token_seconds_sum": 3,
        "request_queue_time_seconds_sum": 1,
        "request_prefill_time_seconds_sum": 2,
        "request_decode_time_seconds_sum": 4,
        "e2e_request_latency_seconds_sum": 7,
        "request_time_per_output_token_seconds_sum": 2 / 4 + 2 / 8,
    }
    for name, total in expected.items():
        assert value(page, f'vllm:{name}{{engine="0",model_name="m"}}') == pytest.approx(total), (
            name
        )
    ended = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"}'
    assert value(page, ended) == 2


def test_the_engines_counters() -> None:
    own = {
        "vllm:prefix_cache_queries": ("num_prompt_tokens", 100),
        "vllm:prefix_cache_hits": ("num_cached_tokens", 48),
        "vllm:num_preemptions": ("num_preemptions", 3),
        "nano_vllm:loaded_tokens": ("num_loaded_tokens", 32),
        "nano_vllm:leaked_blocks": ("num_leaked_blocks", 2),
    }
    page = ServerMetrics("m").page([Pong(EngineMetrics(**dict(own.values())), 0, 1.0, 0.5)])
    for name, (_, count) in own.items():
        assert value(page, f'{name}_total{{engine="0",model_name="m"}}') == count, name


def test_blocks_by_state_sum_to_the_pool() -> None:
    pong = Pong(EngineMetrics(num_blocks=10, num_free_blocks=7), 3, 1.0, 0.5)
    page = ServerMetrics("m").page([pong])
    states = {
        state: value(page, f'nano_vllm:kv_blocks{{engine="0",model_name="m",state="{state}"}}')
        for state in ("active", "cached", "free")
    }
    assert states == {"active": 3, "cached": 3, "free": 4}
    assert value(page, 'vllm:kv_cache_usage_perc{engine="0",model_name="m"}') == pytest.approx(0.3)
