"""As many steps are under way as a pipeline has stages, each with sequences of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nano_vllm.batch import Batch, StepResult
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import FakeRunner, make_engine

NUM_SEQUENCES, NUM_TOKENS = 12, 20


class PipelineRunner(FakeRunner):
    """Notes which batches are under way when another one comes."""

    def __init__(self) -> None:
        super().__init__(runs_ahead=False)
        self.under_way: list[Batch] = []
        self.depths: list[int] = []

    def launch(self, batch: Batch) -> SimpleNamespace:
        mine = {s.sequence for s in batch.scheduled if s.samples}
        for other in self.under_way:
            assert not mine & {s.sequence for s in other.scheduled if s.samples}
        self.under_way.append(batch)
        self.depths.append(len(self.under_way))
        step = super().launch(batch)

        def result() -> StepResult:
            assert self.under_way.pop(0) is batch
            return step.result()

        return SimpleNamespace(result=result)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_steady_decode_fills_the_pipeline(num_stages: int) -> None:
    runner = PipelineRunner()
    engine = make_engine(runner, pipeline_parallel_size=num_stages)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    for number in range(NUM_SEQUENCES):
        engine.add_request(str(number), [number, 7, 8], params)
    while engine.has_work:
        engine.step()
    decodes = [batch for batch in runner.batches if batch.is_decode]
    sizes = [batch.num_decodes for batch in decodes]
    share = NUM_SEQUENCES // num_stages
    steady = sizes[2 * num_stages : -2 * num_stages]
    assert len(steady) > NUM_TOKENS // 2
    assert all(size <= share for size in steady)
    assert max(runner.depths) == num_stages
    full = [depth for depth in runner.depths if depth == num_stages]
    assert len(full) >= 0.8 * len(runner.depths)


def test_chunks_of_a_prompt_follow_one_another_through_the_stages() -> None:
    runner = PipelineRunner()
    runner.max_num_batched_tokens = 10
    engine = make_engine(runner, pipeline_parallel_size=3)
    engine.add_request("r", list(range(40)), SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    assert runner.depths == [1, 2, 3]
    assert [batch.scheduled[0].start for batch in runner.batches] == [0, 10, 20]


def test_what_is_aborted_under_way_is_computed_in_vain() -> None:
    runner = PipelineRunner()
    engine = make_engine(runner, pipeline_parallel_size=2)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for number in range(4):
        engine.add_request(str(number), [number, 7, 8], params)
    for _ in range(4):
        engine.step()
    assert runner.under_way
    for number in range(4):
        engine.abort(str(number))
    engine.add_request("new", [5], params)
    finished = []
    while engine.has_work:
        finished += engine.step()
    assert [output.request_id for output in finished] == ["new"]
    assert engine.get_metrics().num_free_blocks == runner.num_blocks
