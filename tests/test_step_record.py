"""Records of hand-made steps; those of the engine's own are tested with the runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nano_vllm.batch import Batch, ScheduledSequence
from nano_vllm.metrics import nvtx_range
from nano_vllm.step_record import Interval, StepRecord, StepRecorder, step_range


def scheduled(num_computed: int, num_tokens: int, samples: bool = True) -> ScheduledSequence:
    sequence: Any = SimpleNamespace(num_computed_tokens=num_computed)
    return ScheduledSequence(sequence, num_tokens, samples, num_computed)


class Bench:
    """A recorder whose host is at `now`, and whose device takes in events at `device_now`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.device_now = 7.0
        bench = self

        class Event:
            time: float | None = None

            def record(self) -> None:
                self.time = bench.device_now

            def synchronize(self) -> None:
                assert self.time is not None

            def elapsed_time(self, end_event: Event) -> float:
                assert self.time is not None
                assert end_event.time is not None
                return (end_event.time - self.time) * 1e3

        self.recorder = StepRecorder(Event, lambda: self.now)

    def phase(self, name: str, seconds: float) -> None:
        with self.recorder.phase(name):
            self.now += seconds

    def launch(self, batch: Batch, start: float, end: float, is_graph: bool = False) -> None:
        for name in ("schedule", "prepare", "forward", "sample"):
            self.phase(name, 1.0)
        self.device_now = start
        self.recorder.begin()
        self.device_now = end
        self.recorder.end(batch, is_graph)


def test_phases_belong_to_their_step_though_the_next_is_launched_ahead() -> None:
    bench = Bench()
    first = Batch([scheduled(0, 4), scheduled(2, 5, samples=False)])
    bench.launch(first, start=8.0, end=20.0)
    decodes: Any = [0]  # of which a batch asks for the number
    ahead = Batch([scheduled(0, 1)], decodes, ahead_rows=[0])
    bench.launch(ahead, start=21.0, end=23.0, is_graph=True)
    for seconds in (0.5, 0.25):
        bench.phase("wait", seconds)
        bench.phase("update", seconds)
    one, two = bench.recorder.records()
    assert (one.query_lens, one.seq_lens, one.num_sampled) == ((4, 5), (4, 7), 1)
    assert (two.query_lens, two.seq_lens, two.num_sampled) == ((1,), (2,), 1), "one ahead"
    assert [one.is_graph, two.is_graph] == [False, True]
    assert one.host["sample"] == (103.0, 104.0)
    assert two.host["schedule"] == (104.0, 105.0)
    assert one.host["wait"] == (108.0, 108.5)
    assert one.host["update"] == (108.5, 109.0)
    assert two.host["wait"].seconds == 0.25
    assert one.device == pytest.approx((101.0, 113.0)), "the recorder was made at 100, or 7"
    assert two.device == pytest.approx((114.0, 116.0))


def test_steps_under_way_have_no_record_yet() -> None:
    bench = Bench()
    bench.launch(Batch([scheduled(0, 4)]), start=8.0, end=9.0)
    bench.phase("wait", 1.0)
    assert bench.recorder.records() == []
    bench.phase("update", 1.0)
    assert len(bench.recorder.records()) == 1


def test_an_attempt_to_schedule_in_vain_is_not_kept() -> None:
    bench = Bench()
    bench.phase("schedule", 5.0)
    bench.launch(Batch([scheduled(0, 4)]), start=8.0, end=9.0)
    bench.phase("wait", 1.0)
    bench.phase("update", 1.0)
    (record,) = bench.recorder.records()
    assert record.host["schedule"] == (105.0, 106.0)


def test_a_step_that_fails_is_forgotten_with_those_behind_it() -> None:
    bench = Bench()
    for _ in range(2):
        bench.launch(Batch([scheduled(0, 4)]), start=8.0, end=9.0)
    with pytest.raises(KeyError), bench.recorder.phase("wait"):
        raise KeyError
    bench.launch(Batch([scheduled(0, 3)]), start=10.0, end=12.0)
    bench.phase("wait", 1.0)
    bench.phase("update", 1.0)
    (record,) = bench.recorder.records()
    assert record.query_lens == (3,)
    assert record.device == pytest.approx((103.0, 105.0))


@pytest.mark.parametrize(
    ("query_lens", "kind"),
    [((1, 1), "decode"), ((5,), "prefill"), ((2, 7), "prefill"), ((1, 7), "mixed")],
)
def test_kinds_and_sums(query_lens: tuple[int, ...], kind: str) -> None:
    seq_lens = tuple(10 + length for length in query_lens)
    record = StepRecord(query_lens, seq_lens, 1, False, {}, Interval(0.0, 1.0))
    assert record.kind == kind
    assert record.num_seqs == len(query_lens)
    assert record.num_tokens == sum(query_lens)
    assert record.num_context_tokens == sum(query_lens) + 10 * len(query_lens)


def test_without_a_recorder_a_phase_is_a_range_for_the_profiler_alone() -> None:
    assert step_range("wait", None) is nvtx_range("wait")
