"""Ends a rank when another one is dead, frozen or has failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from nano_vllm.distributed.progress import Progress

BEAT_SECONDS = 0.5
SILENCE_SECONDS = 7.0
"""Without a beat, a process is dead or stopped."""
LOADING_SILENCE_SECONDS = 60.0
"""While it loads, it may be reading a tensor from a slow disk."""
EXIT_CODE = 1
FAILED = "failed"


class Watchdog:
    """Says in the store that this process lives, and how far it is, and looks at what the others
    say. When one of them is gone it prints a line that names it and ends the process: the thread
    that computes may be held in a collective for ever.

    Args:
        store: a connection of its own.
        rank: this one.
        size: ranks of the group.
        host: of this rank, for people.
        progress: of the thread that computes.
        has_own_store: whether the first rank serves the store, not torchrun.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        host: str,
        progress: Progress,
        has_own_store: bool,
    ) -> None:
        self._store = store
        self._has_own_store = has_own_store
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._host = host
        self._progress = progress
        self._num_beats = 0
        self._beats: dict[int, tuple[Beat, float]] = {}
        """Of each rank the last one, and when it was first seen."""
        self._num_answers = 0
        """Of the store."""
        self._is_closed = threading.Event()
        self._beat()
        self._threads = [
            threading.Thread(target=run, name="watchdog", daemon=True)
            for run in (self._watch, self._watch_store)
        ]
        for thread in self._threads:
            thread.start()

    def tell_failure(self, error: BaseException) -> None:
        """The other ranks end, with a line that names this one."""
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) and text else f"{type(error).__name__}: "
        line = f"rank {self._rank} on {self._host} failed {self._where()}: {kind}{text}"
        self._store.set(FAILED, line)

    def close(self) -> None:
        """The group ends in order: nobody is missed any more."""
        self._is_closed.set()
        for thread in self._threads:
            thread.join(SILENCE_SECONDS)

    def _watch(self) -> None:
        while not self._is_closed.wait(BEAT_SECONDS):
            try:
                self._beat()
                gone = self._whoever_is_gone()
            except RuntimeError:
                gone = self._without_store("is dead")
            self._num_answers += 1
            if gone is not None:
                self._end(gone)

    def _watch_store(self) -> None:
        """Its calls wait for whoever serves it, who may be frozen.

        Turns are counted, not seconds: this process may have been frozen itself.
        """
        num_seen = num_turns = 0
        while not self._is_closed.wait(BEAT_SECONDS):
            num_turns = num_turns + 1 if num_seen == self._num_answers else 0
            num_seen = self._num_answers
            if num_turns * BEAT_SECONDS > SILENCE_SECONDS:
                self._end(self._without_store("does not answer"), tells=False)

    def _without_store(self, what: str) -> str:
        if not self._has_own_store:
            return f"torchrun, which serves the store, {what}, {self._where()}"
        beat, _ = self._beats.get(0, (Beat(0, -1, 0.0, "its host", 0, ""), 0.0))
        kill_if_near(beat)
        return f"rank 0 on {beat.host} {what}, {self._where(beat.step)}"

    def _beat(self) -> None:
        self._num_beats += 1
        waiting_since = self._progress.waiting_since
        waits = waiting_since is not None and time.monotonic() - waiting_since
        beat = Beat(
            self._num_beats,
            self._progress.step,
            float(waits),
            self._host,
            os.getpid(),
            process_space(),
        )
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _whoever_is_gone(self) -> str | None:
        """Why this process is to end."""
        if self._store.check([FAILED]):
            return self._store.get(FAILED).decode()
        now = time.monotonic()
        for other in self._others:
            if not self._store.check([f"beat/{other}"]):
                continue  # it has not come yet
            beat = Beat(*json.loads(self._store.get(f"beat/{other}")))
            if other not in self._beats or self._beats[other][0].number != beat.number:
                self._beats[other] = beat, now
            reason = self._why_gone(beat, now - self._beats[other][1])
            if reason is not None and self._store.check([FAILED]):
                # It may have ended since this was looked at above, because of whom it names.
                return self._store.get(FAILED).decode()
            if reason is not None:
                return f"rank {other} on {beat.host} {reason}, {self._where(beat.step)}"
        return None

    def _why_gone(self, beat: Beat, silence: float) -> str | None:
        if is_near(beat) and is_dead(beat.pid):
            return "is dead"
        is_loading = self._progress.step < 0  # which takes some ranks longer than others
        # Once one has a step all have loaded, also those whose last beat does not say so yet.
        loads = is_loading and beat.step < 0
        if silence > (LOADING_SILENCE_SECONDS if loads else SILENCE_SECONDS):
            kill_if_near(beat)
            return f"has given no sign of life for {silence:.0f} s"
        waiting_since = self._progress.waiting_since
        if waiting_since is None or beat.waiting_seconds or is_loading:
            return None
        waited = time.monotonic() - waiting_since
        if waited > self._progress.patience:
            return f"is frozen: others have waited {waited:.0f} s for it"
        return None

    def _where(self, last_heard: int = -1) -> str:
        """The step that the ranks are in."""
        step = max(last_heard, self._progress.step)
        return "while it loads" if step < 0 else f"in step {step}"

    def _end(self, reason: str, tells: bool = True) -> None:
        if self._is_closed.is_set():
            return
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if tells:
            # Else the others would name this rank, as the first that they see go.
            with contextlib.suppress(RuntimeError):
                self._store.set(FAILED, reason)
            if self._has_own_store and self._rank == 0:
                time.sleep(3 * BEAT_SECONDS)  # for the others to read that
        os._exit(EXIT_CODE)


class Beat(NamedTuple):
    """A sign of life."""

    number: int
    step: int
    waiting_seconds: float
    """In a collective, for others."""
    host: str
    pid: int
    process_space: str
    """Who has the same can look at the process."""


def process_space() -> str:
    """Where process ids mean the same: a PID namespace of a running kernel; "" if not known."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_near(beat: Beat) -> bool:
    """Whether its process id means the same here."""
    return beat.process_space != "" and beat.process_space == process_space()


def kill_if_near(beat: Beat) -> None:
    """A process that is stopped would stay for ever."""
    if is_near(beat):
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)


def is_dead(pid: int) -> bool:
    """Whether a process of this process space has ended, waited for or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")
