from __future__ import annotations

from nano_vllm.metrics import LapTimer


def test_laps_follow_one_another() -> None:
    times = iter([10.0, 11.0, 14.0])
    timer = LapTimer(lambda: next(times))
    timer.lap("first")
    timer.lap("second")
    assert timer.laps == {"first": 1.0, "second": 3.0}
    assert timer.total == 4.0


def test_the_first_lap_may_have_begun_elsewhere() -> None:
    timer = LapTimer(lambda: 10.0, start=7.5)
    timer.lap("first")
    assert timer.laps == {"first": 2.5}
