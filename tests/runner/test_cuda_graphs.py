"""Which steps become CUDA graphs, and the padded batches that they read."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nano_vllm._core import BlockAllocator, DecodeRows
from nano_vllm.batch import Batch, ScheduledSequence
from nano_vllm.config import EngineConfig
from nano_vllm.engine.llm import LLM
from nano_vllm.runner.cuda_graphs import Forward, Padding, StepGraphs
from nano_vllm.runner.graph_shapes import decode_sizes, sequence_sizes, token_sizes
from nano_vllm.runner.input_batch import ModelInput
from nano_vllm.runner.model_runner import LaunchedStep, ModelRunner
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence
from tests.models.checkpoints import make_checkpoint


def decodes(count: int) -> Batch:
    """A step of sequences all of whose tokens but the last are computed."""
    allocator = BlockAllocator(count, 16)
    rows = DecodeRows(allocator, count)
    for _ in range(count):
        sequence = Sequence(0, "0", 0, [7] * 5, SamplingParams())
        scheduled = ScheduledSequence(sequence, 1, True)
        rows.add(scheduled, sequence.token_ids, [allocator.allocate()], [], 9, 0, (), False)
    step = rows.schedule(count)
    return Batch(step.scheduled, step)


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 256, 300])
def test_sizes_rise_to_the_largest(largest: int) -> None:
    for sizes in (decode_sizes(largest), sequence_sizes(largest)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
    assert all(b - a <= max(a, 16) for a, b in pairwise(decode_sizes(largest)))


def test_token_sizes_stay_within_what_a_step_may_hold() -> None:
    assert token_sizes(20) == []
    assert token_sizes(100) == [32, 64, 96]
    sizes = token_sizes(8192)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 2048
    gaps = [(a, b) for a, b in pairwise(sizes) if b - a > max(a / 4, 32)]
    assert gaps == [(384, 512)]  # 448 would take longer than 512


def test_a_step_of_decodes_takes_the_next_size() -> None:
    graphs = StepGraphs(1000, max_num_seqs=20)
    sizes = [graphs.padding_for(decodes(n), n) for n in (1, 3, 5, 16, 17, 20)]
    assert sizes == [Padding(size, size) for size in (1, 4, 8, 16, 20, 20)]
    assert graphs.padding_for(decodes(21), 21) is None


def prompt(num_tokens: int) -> ScheduledSequence:
    sequence = Sequence(0, "0", 0, [7] * num_tokens, SamplingParams())
    return ScheduledSequence(sequence, num_tokens, True)


def test_a_step_with_prompts_is_padded_in_tokens_and_sequences() -> None:
    graphs = StepGraphs(1000, max_num_seqs=20)
    batch = decodes(2)
    assert graphs.padding_for(Batch([prompt(5)]), 1) == Padding(32, 16)
    mixed = Batch([*batch.scheduled, prompt(31)], batch.decodes)
    assert graphs.padding_for(mixed, 3) == Padding(64, 16)
    assert graphs.padding_for(mixed, 17) == Padding(64, 20)
    assert graphs.padding_for(mixed, 33) is None
    assert StepGraphs(1000, max_num_seqs=64).padding_for(mixed, 33) == Padding(64, 64)
    assert graphs.padding_for(Batch([prompt(40) for _ in range(20)]), 20) == Padding(896, 20)
    assert graphs.padding_for(Batch([prompt(999)]), 1) is None


def test_usual_steps_are_what_steps_are_padded_to() -> None:
    graphs = StepGraphs(1000, max_num_seqs=40, shares_prefixes=True, spreads_chunks=True)
    usual = {shape[:4] for shape in graphs._usual if shape.is_shared}
    assert len(graphs._usual) == len(set(graphs._usual))
    for count in (1, 3, 40):
        assert (True, 1, *graphs.padding_for(decodes(count), count)) in usual
    for count in (5, 200, 512):
        padding = graphs.padding_for(Batch([prompt(count)]), 1)
        assert (False, padding.num_tokens, *padding) in usual
    assert (False, 1, *graphs.padding_for(Batch([prompt(30)]), 30)) in usual
    assert graphs.missing() == (True, 1, 1, 1, False)


class CapturesNothing(StepGraphs):
    """Runs in place of a capture, and of what was captured."""

    def _capture(self, forward: Forward, inputs: ModelInput) -> Any:
        return SimpleNamespace(replay=lambda: None), forward(inputs)


def test_graphs_are_captured_by_steps_that_do_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    prompt = [3, 5, 7] * 9
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(
        str(tmp_path), device="cpu", dtype="float32", skip_tokenizer_init=True, max_num_seqs=20
    ) as llm:
        (expected,) = llm.generate([prompt], params, use_tqdm=False)
        assert not llm.engine.prepare_graph()
        runner = llm.engine.runner
        runner.graphs = graphs = CapturesNothing(64, 20, shares_prefixes=True)
        num_steps = 0
        while llm.engine.prepare_graph():
            num_steps += 1
        assert num_steps == 2 * len(graphs._usual)
        assert set(graphs._graphs) == set(graphs._usual)
        runner.graphs = None
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        llm.engine.add_request("0", prompt, params)
        with pytest.raises(RuntimeError, match="nothing is under way"):
            llm.engine.prepare_graph()


class WithoutCapture(StepGraphs):
    def run(self, forward: Forward, inputs: ModelInput) -> torch.Tensor:
        return forward(inputs)


class PaddedRunner(ModelRunner):
    """Pads its steps as for graphs, and runs them without."""

    def __init__(self, config: EngineConfig, *options: Any) -> None:
        super().__init__(config, *options)
        self.graphs = WithoutCapture(self.max_num_batched_tokens, config.max_num_seqs)
        self.paddings: set[tuple[int, int, int]] = set()

    def launch(self, batch: Batch) -> LaunchedStep:
        assert self.graphs is not None
        num_rows = batch.num_decodes + len(self.input_batch.prompt_rows(batch))
        padding = self.graphs.padding_for(batch, num_rows)
        if padding is not None:
            self.paddings.add((len(batch.scheduled), *padding))
        return super().launch(batch)


@pytest.mark.parametrize("budget", [2048, 32])
def test_padded_steps_generate_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Of five sequences that end one after the other: each size from five down to one; and with
    prompts in chunks beside decodes.
    """
    make_checkpoint(tmp_path)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 199) for _ in range(n)] for n in (1, 9, 17, 33, 5)]
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 8, 12, 16, 20)
    ]

    def generate() -> tuple[list[list[int]], ModelRunner]:
        with LLM(
            str(tmp_path),
            device="cpu",
            dtype="float32",
            skip_tokenizer_init=True,
            max_num_seqs=7,
            max_num_batched_tokens=budget,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs], llm.engine.runner

    expected, _ = generate()
    monkeypatch.setattr("nano_vllm.runner.model_runner.ModelRunner", PaddedRunner)
    tokens, runner = generate()
    assert tokens == expected
    assert isinstance(runner, PaddedRunner)
    if budget == 2048:
        assert runner.paddings == {
            (5, 96, 7), (5, 7, 7), (4, 4, 4), (3, 4, 4), (2, 2, 2), (1, 1, 1),
        }  # fmt: skip
    else:
        assert (4, 32, 7) in runner.paddings
