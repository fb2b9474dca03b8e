"""Ctrl-C at the worst moment leaves nothing behind."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from nano_vllm import LLM, SamplingParams
from nano_vllm.engine.engine import Engine
from nano_vllm.engine.interrupts import InterruptsWait
from nano_vllm.engine.output_processor import OutputProcessor
from nano_vllm.engine.scheduler import Scheduler
from tests.engine.fake_runner import FakeRunner, make_engine, make_tokenizer

PROMPTS = [[i, *range(12 * i)] for i in range(1, 9)]
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
MOMENTS = (
    (Scheduler, "add"),
    (Scheduler, "schedule"),
    (Scheduler, "schedule_ahead"),
    (Scheduler, "update"),
    (Scheduler, "observe"),
    (Engine, "_note_start"),
    (Engine, "_reported"),
    (Engine, "_finish"),
    (OutputProcessor, "advance"),
)


@pytest.fixture(autouse=True)
def _handler() -> Any:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def make_llm() -> LLM:
    return LLM.from_engine(make_engine(FakeRunner(num_blocks=128), make_tokenizer()))


def generate(llm: LLM) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize(("owner", "name"), MOMENTS)
@pytest.mark.parametrize("behind", [False, True])
def test_an_interrupted_step_is_done_to_its_end(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, behind: bool
) -> None:
    expected = generate(make_llm())
    llm = make_llm()
    original, left = getattr(owner, name), [1]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not behind and left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        result = original(*args, **kwargs)
        if behind and left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    metrics = llm.get_metrics()
    assert metrics.num_free_blocks == metrics.num_blocks
    assert metrics.num_running == metrics.num_waiting == 0
    assert generate(llm) == expected
    assert llm.get_metrics().num_leaked_blocks == 0


def interrupt(times: int, reached: list[int], error: Exception | None = None) -> None:
    """Interrupt so many times, and write down how far that came."""
    with InterruptsWait():
        for time in range(times):
            signal.raise_signal(signal.SIGINT)
            reached.append(time)
        if error is not None:
            raise error


@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_second_one_counts_at_once(times: int) -> None:
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(times, reached)
    assert reached == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupt(0, reached)


def test_an_error_is_told_with_the_interrupt() -> None:
    error = ValueError("a")
    with pytest.raises(KeyboardInterrupt) as stop:
        interrupt(1, [], error)
    assert stop.value.__context__ is error


def test_other_threads_get_none() -> None:
    results: list[Any] = []

    def work() -> None:
        results.append(generate(make_llm()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(results[0]) == len(PROMPTS)
