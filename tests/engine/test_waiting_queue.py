"""Who is next, and that nobody starves."""

from __future__ import annotations

import random
from collections import deque

import pytest

from nano_vllm.engine import waiting_queue
from nano_vllm.engine.waiting_queue import PATIENCE, WaitingQueue
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence


def make_sequence(arrival: int, priority: int = 0, index: int = 0) -> Sequence:
    sequence = Sequence(arrival, f"r{arrival}", index, [1], SamplingParams())
    sequence.arrival, sequence.priority = arrival, priority
    return sequence


def check_order(queue: WaitingQueue) -> None:
    waiting = list(queue)
    assert len(queue) == len(waiting)
    assert waiting == sorted(waiting, key=queue.order)
    assert all(sequence in queue for sequence in waiting)
    assert queue.head is (waiting[0] if waiting else None)


@pytest.mark.parametrize("by_priority", [False, True])
def test_first_come_first_served(by_priority: bool) -> None:
    """Priorities do not count, or are all equal; also of those that come back."""
    draw = random.Random(by_priority)
    queue = WaitingQueue(by_priority)
    waiting: list[tuple[int, int]] = []
    admitted: list[Sequence] = []
    for arrival in range(400):
        priority = 5 if by_priority else draw.randrange(9)
        for index in range(draw.choice([1, 1, 3])):
            queue.push(make_sequence(arrival, priority, index))
            waiting.append((arrival, index))
        while waiting and draw.random() < 0.5:
            sequence = queue.pop()
            assert (sequence.arrival, sequence.index) == min(waiting)
            waiting.remove(min(waiting))
            assert sequence not in queue
            admitted.append(sequence)
        if admitted and draw.random() < 0.3:
            preempted = admitted.pop(draw.randrange(len(admitted)))
            queue.push(preempted)
            waiting.append((preempted.arrival, preempted.index))
        if waiting and draw.random() < 0.1:
            aborted = draw.choice(list(queue))
            queue.remove(aborted)
            assert aborted not in queue
            waiting.remove((aborted.arrival, aborted.index))
        check_order(queue)


def test_the_lowest_number_comes_first_and_of_equals_the_first_to_come() -> None:
    queue = WaitingQueue(by_priority=True)
    for arrival, priority in enumerate([3, -1, 3, 0, -1, 2**31 - 1, -(2**31)]):
        queue.push(make_sequence(arrival, priority))
    order = [queue.pop().arrival for _ in range(7)]
    assert order == [6, 1, 4, 3, 0, 2, 5]
    assert queue.head is None


def test_an_urgent_stream_passes_the_first_patience_times() -> None:
    queue = WaitingQueue(by_priority=True)
    patient = make_sequence(0, priority=1)
    queue.push(patient)
    for arrival in range(1, PATIENCE + 1):
        queue.push(make_sequence(arrival))
        assert queue.pop() is not patient
    queue.push(make_sequence(PATIENCE + 1))
    assert queue.pop() is patient
    # Which starts the patience of the next one anew.
    patient = make_sequence(PATIENCE + 2, priority=1)
    queue.pop()
    queue.push(patient)
    for arrival in range(PATIENCE + 3, 2 * PATIENCE + 3):
        queue.push(make_sequence(arrival))
        assert queue.pop() is not patient
    queue.push(make_sequence(2 * PATIENCE + 3))
    assert queue.pop() is patient


@pytest.mark.parametrize("patience", [1, 2, 5, 64])
@pytest.mark.parametrize("stream", ["urgent", "random", "ever more urgent", "bursts"])
def test_nobody_waits_longer_than_the_bound(
    monkeypatch: pytest.MonkeyPatch, patience: int, stream: str
) -> None:
    monkeypatch.setattr(waiting_queue, "PATIENCE", patience)
    draw = random.Random(f"{patience} {stream}")
    queue = WaitingQueue(by_priority=True)
    latest: dict[Sequence, int] = {}
    """Number of the admission that each must have had its own by."""
    arrival = num_admitted = 0
    for step in range(20 * patience + 400):
        count = {"bursts": draw.choice([0] * 8 + [7])}.get(stream, draw.choice([0, 1, 1, 1, 2]))
        for _ in range(count):
            priority = {
                "urgent": draw.choice([0, 0, 0, 9]),
                "ever more urgent": -step,
            }.get(stream, draw.randrange(5))
            sequence = make_sequence(arrival, priority)
            arrival += 1
            latest[sequence] = num_admitted + (len(queue) + 1) * (patience + 1)
            queue.push(sequence)
        if queue.head is not None:
            head = queue.head
            assert queue.pop() is head
            num_admitted += 1
            assert num_admitted <= latest.pop(head)
        if latest and draw.random() < 0.05:
            aborted = draw.choice(list(latest))
            queue.remove(aborted)
            del latest[aborted]
            check_order(queue)
    assert all(num_admitted <= last for last in latest.values())


def test_a_preempted_sequence_comes_back_to_its_place() -> None:
    queue = WaitingQueue(by_priority=True)
    sequences = deque(make_sequence(arrival, arrival % 2) for arrival in range(6))
    for sequence in sequences:
        queue.push(sequence)
    first = queue.pop()
    second = queue.pop()
    queue.push(first)
    assert queue.pop() is first
    second.is_protected = True
    second.priority = 9
    queue.push(second)
    assert queue.pop() is second
    check_order(queue)
