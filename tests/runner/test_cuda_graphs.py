"""Which steps become CUDA graphs, and the padded batches that they read."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from nano_vllm._core import BlockAllocator, DecodeRows
from nano_vllm.batch import Batch, ScheduledSequence
from nano_vllm.config import EngineConfig
from nano_vllm.engine.llm import LLM
from nano_vllm.runner.cuda_graphs import DecodeGraphs, graph_sizes
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
    sizes = graph_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest
    assert all(b - a <= max(a, 16) for a, b in pairwise(sizes))


def test_a_step_takes_the_next_size() -> None:
    graphs = DecodeGraphs(lambda inputs: inputs.input_ids, max_num_seqs=20)
    sizes = [graphs.size_for(decodes(n)) for n in (1, 3, 5, 16, 17, 20)]
    assert sizes == [1, 4, 8, 16, 20, 20]
    assert graphs.size_for(decodes(21)) is None


def test_other_steps_have_no_graph() -> None:
    graphs = DecodeGraphs(lambda inputs: inputs.input_ids, max_num_seqs=8)
    batch = decodes(2)
    prompt = ScheduledSequence(Sequence(0, "0", 0, [7] * 5, SamplingParams()), 5, True)
    assert graphs.size_for(Batch([*batch.scheduled, prompt], batch.decodes)) is None
    assert graphs.size_for(Batch([prompt])) is None


class WithoutCapture(DecodeGraphs):
    def logits(self, inputs: ModelInput) -> torch.Tensor:
        return self._forward(inputs)


class PaddedRunner(ModelRunner):
    """Pads its decodes as for a graph, and runs them without."""

    def __init__(self, config: EngineConfig, *options: Any) -> None:
        super().__init__(config, *options)
        self.graphs = WithoutCapture(self._decode, 7)
        self.decodes: set[tuple[int, int]] = set()

    def launch(self, batch: Batch) -> LaunchedStep:
        assert self.graphs is not None
        size = self.graphs.size_for(batch)
        if size is not None:
            self.decodes.add((len(batch.scheduled), size))
        return super().launch(batch)


def test_padded_steps_generate_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five sequences that end one after the other: each size from five down to one."""
    make_checkpoint(tmp_path)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 199) for _ in range(n)] for n in (1, 9, 17, 33, 5)]
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 8, 12, 16, 20)
    ]

    def generate() -> tuple[list[list[int]], ModelRunner]:
        with LLM(
            str(tmp_path), device="cpu", dtype="float32", skip_tokenizer_init=True, max_num_seqs=7
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs], llm.engine.runner

    expected, _ = generate()
    monkeypatch.setattr("nano_vllm.runner.model_runner.ModelRunner", PaddedRunner)
    tokens, runner = generate()
    assert tokens == expected
    assert isinstance(runner, PaddedRunner)
    assert runner.decodes == {(5, 7), (4, 4), (3, 4), (2, 2), (1, 1)}
