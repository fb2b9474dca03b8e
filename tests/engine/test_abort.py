"""Whatever a request is doing when it is aborted, all that it held is free within two steps, and
nobody else notices.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from nano_vllm.engine.engine import Engine
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence, SequenceStatus
from tests.engine.fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    check_invariants,
    make_engine,
    reference_beams,
    reference_tokens,
)

MAX_MODEL_LEN = 64
MAX_STEPS = 1000
"""Of a run, which takes some 150."""
NUM_BLOCKS = 20
SEARCH = BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(n=4, seed=3, max_tokens=20, ignore_eos=True)
STREAM = SamplingParams(seed=7, max_tokens=30, ignore_eos=True)


def is_waiting(engine: Engine, sequences: list[Sequence]) -> bool:
    return sequences[0] in engine.scheduler.waiting and not sequences[0].num_preemptions


def is_prefilling(engine: Engine, sequences: list[Sequence]) -> bool:
    first = sequences[0]
    return 0 < first.num_computed_tokens < first.num_prompt_tokens


def is_running(engine: Engine, sequences: list[Sequence]) -> bool:
    return all(s in engine.scheduler.running and s.num_output_tokens > 2 for s in sequences)


def is_preempted(engine: Engine, sequences: list[Sequence]) -> bool:
    return any(s in engine.scheduler.waiting and s.num_preemptions for s in sequences)


def waits_without_blocks(engine: Engine, sequences: list[Sequence]) -> bool:
    """For the other beams; it had to give its blocks to them."""
    return any(
        s.num_preemptions
        and s.num_output_tokens
        and s.status is SequenceStatus.WAITING
        and s not in engine.scheduler.waiting
        for s in sequences
    ) and any(s in engine.scheduler.running for s in sequences)


def is_in_flight(engine: Engine, sequences: list[Sequence]) -> bool:
    """With a step of it under way, and some tokens known."""
    rows = [row.sequence for batch, _ in engine._launched for row in batch.scheduled]
    return any(s in rows for s in sequences) and any(s.num_output_tokens for s in sequences)


def is_prefill_in_flight(engine: Engine, sequences: list[Sequence]) -> bool:
    rows = [row.sequence for batch, _ in engine._launched for row in batch.scheduled]
    return sequences[0] in rows and not sequences[0].num_output_tokens


MOMENTS = {
    "search": (
        is_waiting,
        is_prefilling,
        is_running,
        is_preempted,
        waits_without_blocks,
        is_in_flight,
        is_prefill_in_flight,
    ),
    "sampled": (
        is_waiting,
        is_prefilling,
        is_running,
        is_preempted,
        is_in_flight,
        is_prefill_in_flight,
    ),
}


def abort_at(moment: Callable[[Engine, list[Sequence]], bool], searches: bool, seed: int) -> bool:
    """Run streams beside a request that is aborted at the moment, and is then asked for again;
    whether the moment came.
    """
    draw = random.Random(seed)
    num_stages = draw.choice([1, 1, 2, 3])
    runner = FakeRunner(
        NUM_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=draw.choice([8, 16, 64]),
        num_host_blocks=draw.choice([0, 8]),
        runs_ahead=num_stages == 1,
    )
    engine = make_engine(
        runner,
        max_num_seqs=draw.choice([4, 8]),
        pipeline_parallel_size=num_stages,
        enable_prefix_caching=draw.random() < 0.7,
    )
    engine.scheduler.admission.horizon = draw.choice([0, 8])
    prompts = {
        name: [draw.randrange(VOCAB_SIZE) for _ in range(draw.choice([5, 20, 40]))]
        for name in ("one", "other", "request")
    }
    for name in ("one", "other"):
        engine.add_request(name, prompts[name], STREAM)
    for _ in range(draw.randrange(6)):
        engine.step()

    def ask(name: str) -> list[Sequence]:
        prompt = prompts["request"]
        if searches:
            request = engine.make_beam_request(name, prompt, SEARCH)
        else:
            request = engine.make_request(name, prompt, SAMPLED)
        engine.add(request)
        return request.sequences

    outputs: dict[str, RequestOutput] = {}
    num_steps = 0

    def step() -> None:
        nonlocal outputs, num_steps
        num_steps += 1
        assert num_steps < MAX_STEPS, "it comes to no end"
        outputs |= {output.request_id: output for output in engine.step()}

    sequences = ask("request")
    while not (came := moment(engine, sequences)) and "request" not in outputs:
        step()
    if not came:
        return False
    output = engine.abort("request")
    assert output is not None
    assert any(completion.finish_reason == "abort" for completion in output.outputs)
    for _ in range(2):
        step()
    assert all(sequence.is_finished and not sequence.block_table for sequence in sequences)
    check_invariants(engine)
    others = {sequence.request_id for sequence in engine.scheduler.running}
    others |= {sequence.request_id for sequence in engine.scheduler.waiting}
    assert others <= {"one", "other"}
    assert engine.scheduler.num_waiting == len(engine.scheduler.waiting)
    ask("again")
    while engine.has_work:
        step()
        check_invariants(engine)
    assert set(outputs) == {"one", "other", "again"}
    for name in ("one", "other"):
        expected = reference_tokens(prompts[name], STREAM, 0, MAX_MODEL_LEN)
        assert outputs[name].outputs[0].token_ids == expected
    found = [completion.token_ids for completion in outputs["again"].outputs]
    if searches:
        hypotheses = reference_beams(prompts["request"], SEARCH, MAX_MODEL_LEN)
        assert found == [h.token_ids for h in hypotheses]
    else:
        assert found == [
            reference_tokens(prompts["request"], SAMPLED, index, MAX_MODEL_LEN)
            for index in range(4)
        ]
    metrics = engine.get_metrics()
    assert (metrics.num_free_blocks, metrics.num_leaked_blocks) == (NUM_BLOCKS, 0)
    return True


@pytest.mark.parametrize(
    ("kind", "moment"), [(kind, moment) for kind, them in MOMENTS.items() for moment in them]
)
def test_all_is_free_within_two_steps(
    kind: str, moment: Callable[[Engine, list[Sequence]], bool]
) -> None:
    assert sum(abort_at(moment, kind == "search", seed) for seed in range(60)) >= 5
