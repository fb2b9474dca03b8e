"""What a watchdog makes of the signs of life that it finds."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from nano_vllm.distributed import watchdog
from nano_vllm.distributed.progress import Progress
from nano_vllm.distributed.watchdog import Beat, Watchdog


class Store:
    """The part of torch's that a watchdog uses, in memory."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def dog(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> Watchdog:
    """Of rank 0 of two, looked after by the test alone."""
    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(watchdog, "kill_if_near", lambda _: None)
    return Watchdog(Store(), 0, 2, "here", Progress(), has_own_store=True)


def beat(dog: Watchdog, number: int, step: int, waits: float = 0.0, **fields: Any) -> None:
    space, pid = fields.get("space", "elsewhere"), fields.get("pid", 1)
    said = Beat(number, step, waits, "there", pid, space)
    dog._store.set("beat/1", json.dumps(said))


@pytest.mark.parametrize(("step", "limit"), [(5, 7.0), (-1, 60.0)])
def test_silence(dog: Watchdog, clock: list[float], step: int, limit: float) -> None:
    beat(dog, 1, step)
    assert dog._whoever_is_gone() is None
    clock[0] += limit - 1
    assert dog._whoever_is_gone() is None
    beat(dog, 2, step)
    assert dog._whoever_is_gone() is None
    clock[0] += limit + 1
    where = "in step 5" if step == 5 else "while it loads"
    said = f"rank 1 on there has given no sign of life for {limit + 1:.0f} s, {where}"
    assert dog._whoever_is_gone() == said


@pytest.mark.parametrize(
    ("own_step", "waits", "is_frozen"), [(5, 0.0, True), (5, 3.0, False), (-1, 0.0, False)]
)
def test_a_rank_that_others_wait_for(
    dog: Watchdog, clock: list[float], own_step: int, waits: float, is_frozen: bool
) -> None:
    """Not one that waits itself, nor one that takes longer to load."""
    dog._progress.step = own_step
    with dog._progress.waiting():
        dog._progress.waiting_since = clock[0]
        for number in range(1, 60):
            beat(dog, number, own_step, waits)
            gone = dog._whoever_is_gone()
            assert gone is None or number > 40
            clock[0] += 0.5
    assert (gone is not None) == is_frozen
    if is_frozen:
        assert gone is not None
        assert gone.startswith("rank 1 on there is frozen: others have waited")


def test_a_process_that_has_ended(dog: Watchdog) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    beat(dog, 1, 3, pid=pid, space=watchdog.process_space())
    for _ in range(200):
        if watchdog.is_dead(pid):  # and waits for its parent
            break
        time.sleep(0.01)
    assert dog._whoever_is_gone() == "rank 1 on there is dead, in step 3"
    os.waitpid(pid, 0)
    assert watchdog.is_dead(pid)
    assert not watchdog.is_dead(os.getpid())


def test_a_failure_is_told(dog: Watchdog) -> None:
    dog._progress.step = 4
    dog.tell_failure(OSError("no\n  more"))
    assert dog._whoever_is_gone() == "rank 0 on here failed in step 4: OSError: no more"


def test_who_ended_because_of_another_is_not_named(
    dog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why before it ends, which may be between two looks."""
    said = "rank 2 on there is dead, in step 3"

    def end(_: int) -> bool:
        dog._store.set(watchdog.FAILED, said)
        return True

    monkeypatch.setattr(watchdog, "is_dead", end)
    beat(dog, 1, 3, space=watchdog.process_space())
    assert dog._whoever_is_gone() == said
