"""The steps of an engine leave records that tell what it did."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nano_vllm import LLM, SamplingParams
from nano_vllm.batch import StepResult
from nano_vllm.runner.model_runner import LaunchedStep, ModelRunner
from nano_vllm.step_record import PHASES, ClockEvent, StepRecord, StepRecorder
from tests.models.checkpoints import make_checkpoint

PROMPTS = [list(range(3, 3 + length)) for length in (9, 20, 30)]
MAX_TOKENS = (8, 3, 5)


@pytest.fixture(params=[True, False], ids=["ahead", "step by step"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a CPU too."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", True)
    return request.param


def make_llm(folder: Path, device: str, runs_ahead: bool) -> LLM:
    make_checkpoint(folder)
    return LLM(
        str(folder),
        device=device,
        dtype="float32",
        max_num_batched_tokens=24,
        skip_tokenizer_init=True,
        max_num_seqs=2,
        num_blocks=60,
        block_size=8,
        max_model_len=80,
        async_scheduling=runs_ahead,
        enable_prefix_caching=False,
    )


def make_recorder(device: str) -> StepRecorder:
    on_gpu = device == "cuda"
    return StepRecorder(partial(torch.cuda.Event, enable_timing=True) if on_gpu else ClockEvent)


def generate(llm: LLM) -> list[list[int]]:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in MAX_TOKENS]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def check(records: list[StepRecord]) -> None:
    """Every prompt's token once, and every output but a sequence's last; the host does one thing at
    a time, the device one step.
    """
    assert {record.kind for record in records} == {"prefill", "mixed", "decode"}
    assert sum(record.num_sampled for record in records) == sum(MAX_TOKENS)
    seen = [
        pair for record in records for pair in zip(record.query_lens, record.seq_lens, strict=True)
    ]
    prompts = [queries for queries, _ in seen if queries > 1]
    assert sum(prompts) == sum(map(len, PROMPTS))
    assert len(prompts) > len(PROMPTS), "some are cut"
    assert sorted(length for queries, length in seen if queries == 1) == sorted(
        len(prompt) + n for prompt, m in zip(PROMPTS, MAX_TOKENS, strict=True) for n in range(1, m)
    )
    for record in records:
        assert tuple(record.host) == PHASES
    host = sorted(interval for record in records for interval in record.host.values())
    for intervals in (host, [record.device for record in records]):
        assert all(interval.start <= interval.end for interval in intervals)
        assert all(before.end <= after.start for before, after in pairwise(intervals))


def test_records_of_a_run(tmp_path: Path, device: str, runs_ahead: bool) -> None:
    with make_llm(tmp_path, device, runs_ahead) as llm:
        expected = generate(llm)
        recorder = make_recorder(device)
        llm.engine.record_steps(recorder)
        before = llm.get_metrics().num_steps
        assert generate(llm) == expected
        records = recorder.records()
        assert len(records) == llm.get_metrics().num_steps - before
        check(records)
        ahead = [
            after.host["schedule"].start < before.host["wait"].start
            for before, after in pairwise(records)
        ]
        assert any(ahead) == runs_ahead
        if device == "cpu":
            for record in records:
                host, seconds = record.host, record.device.seconds
                launching = host["forward"].seconds + host["sample"].seconds
                assert launching - 1e-9 < seconds < host["wait"].start - host["prepare"].start
        llm.engine.record_steps(None)
        generate(llm)
        assert len(recorder.records()) == len(records)


def test_a_step_that_fails_leaves_the_records_in_step(
    tmp_path: Path, device: str, runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, calls = LaunchedStep.result, iter(range(1000))

    def failing(step: LaunchedStep) -> StepResult:
        if next(calls) == 4:
            raise OSError("once")
        return result(step)

    monkeypatch.setattr(LaunchedStep, "result", failing)
    with make_llm(tmp_path, device, runs_ahead) as llm:
        recorder = make_recorder(device)
        llm.engine.record_steps(recorder)
        engine = llm.engine
        for i, prompt in enumerate(PROMPTS):
            params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS[i], ignore_eos=True)
            engine.add_request(str(i), prompt, params)
        failures = 0
        while engine.has_work:
            try:
                engine.step()
            except OSError:
                failures += 1
        assert failures == 1
        assert len(recorder.records()) == llm.get_metrics().num_steps
        check(recorder.records())


def test_recording_begins_between_steps(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "runs_ahead", True)
    with make_llm(tmp_path, device, runs_ahead=True) as llm:
        llm.engine.add_request("r", PROMPTS[0], SamplingParams(temperature=0, max_tokens=9))
        llm.engine.step()
        llm.engine.step()
        with pytest.raises(RuntimeError, match="a step is under way"):
            llm.engine.record_steps(make_recorder(device))
