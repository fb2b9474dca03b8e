"""Who is next, and who has to go first."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator

from nano_vllm.sequence import Sequence

PATIENCE = 64
"""Later arrivals that a waiting request lets pass: a request before which r others arrived is
admitted after (r + 1) * (PATIENCE + 1) admissions at the most.
"""

Order = tuple[bool, int, int, int]


class WaitingQueue:
    """Sequences that wait to be admitted: first come, first served; or by priority, the lowest
    number first, and of one priority the first to come.

    A stream of higher priorities starves nobody: the request that came first of all that wait is
    protected once PATIENCE others have passed it. Protected sequences come ahead of all priorities.

    Args:
        by_priority: whether priorities count.
    """

    def __init__(self, by_priority: bool = False) -> None:
        self._by_priority = by_priority
        self._queue: list[Sequence] = []
        """In order."""
        self._arrivals: list[tuple[int, int, Sequence]] = []
        """A heap by arrival; also of sequences that have left since."""
        self._num_passed = 0

    def order(self, sequence: Sequence) -> Order:
        """Rises from those that come first, and go last, to those that come last."""
        if not self._by_priority:
            return False, 0, sequence.arrival, sequence.index
        return (
            not sequence.is_protected,
            sequence.priority,
            sequence.arrival,
            sequence.index,
        )

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def __contains__(self, sequence: Sequence) -> bool:
        place = bisect_left(self._queue, self.order(sequence), key=self.order)
        return place < len(self._queue) and self._queue[place] is sequence

    @property
    def head(self) -> Sequence | None:
        """The next one."""
        return self._queue[0] if self._queue else None

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence at its place."""
        insort(self._queue, sequence, key=self.order)
        if self._by_priority:
            heapq.heappush(self._arrivals, (sequence.arrival, sequence.index, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Forget one that is in the queue."""
        del self._queue[bisect_left(self._queue, self.order(sequence), key=self.order)]

    def pop(self) -> Sequence:
        """Take the head away, to be admitted."""
        taken = self._queue.pop(0)
        if not self._by_priority:
            return taken
        while self._arrivals and self._arrivals[0][2] not in self:
            heapq.heappop(self._arrivals)
        if not self._arrivals or self._arrivals[0][0] > taken.arrival:
            self._num_passed = 0
            return taken
        self._num_passed += 1
        first = self._arrivals[0][2]
        if self._num_passed >= PATIENCE and not first.is_protected:
            self.remove(first)
            first.is_protected = True
            insort(self._queue, first, key=self.order)
        return taken
