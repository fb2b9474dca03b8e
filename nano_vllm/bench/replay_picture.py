"""What a replayed trace looks like step by step: a page with the blocks and the batches."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nano_vllm._core import BlockState
from nano_vllm.engine.event_log import TableChanges, header_fields
from nano_vllm.engine.scheduler import Scheduler
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.sequence import Sequence

COLUMNS = (
    "start",
    "end",
    "ahead",
    "decodes",
    "prefills",
    "preempted",
    "copies",
    "swap_outs",
    "swap_ins",
    "running",
    "waiting",
    "active",
    "cached",
    "tables",
    "to_free",
    "to_cached",
)
"""Of each step, as it was scheduled: seconds, or null; whether ahead; number of decodes; [seq_id,
num_tokens] of each prefill; ids of preempted sequences; numbers of blocks copied within the pool,
to host memory and back; sequences that run and wait; blocks held and cached. Since the step before:
[seq_id, place, blocks] of tables, as `TableChanges` has them, null for a freed one; blocks that
nobody holds any more, by what they are now.
"""


class Picture:
    """Looks at a scheduler behind each event that it has replayed.

    Args:
        scheduler: has not been called yet.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.steps: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.sequences: dict[int, dict[str, Any]] = {}
        """By their ids: request, index, prompt tokens and how many of them were cached,
        preemptions, steps scheduled at arrival and at the end, reason of the end.
        """
        self._scheduler = scheduler
        self._pins: dict[int, Sequence] = {}
        self._num_events = 0
        self._peak = 0
        self._tables = TableChanges()
        self._holders: dict[int, tuple[Sequence, list[int | None]]] = {}
        """Sequences with blocks, and their tables, at the last step; None for a freed block."""

    def see(self, event: dict[str, Any], sequences: Mapping[int, Sequence]) -> None:
        """Take in an event that was replayed as it is.

        Args:
            event: the latest.
            sequences: those that have not ended.
        """
        self._num_events += 1
        name = event["event"]
        if name == "add":
            for fields in event["sequences"]:
                self._add(sequences[fields["id"]])
        elif name in ("schedule", "schedule_ahead") and event["step"] is not None:
            self._add_step(event, sequences)
        elif name == "update":
            self.steps["end"][event["step"]] = _seconds(event)
            for seq_id, reason in event["noticed"]:
                if reason is not None:
                    self._end(seq_id, reason)
        elif name == "finish":
            self._end(event["sequence"], event["reason"])
        elif name == "pin" and event["pin"] is not None:
            self._add_pin(event["pin"])
        elif name == "unpin":
            self._pins.pop(event["pin"]).block_table = []
            self._end(-event["pin"], "unpin")
        elif name == "abort":
            for seq_id in event["ended"]:
                self._end(seq_id, "abort")

    def summary(self) -> dict[str, Any]:
        admitted = [s for s in self.sequences.values() if s["cached"] is not None]
        prompt = sum(s["prompt"] for s in admitted)
        cached = sum(s["cached"] for s in admitted)
        return {
            "events": self._num_events,
            "steps": len(self.steps["start"]),
            "sequences": sum(seq_id >= 0 for seq_id in self.sequences),
            "prompt tokens": prompt,
            "hit rate": round(cached / prompt, 4) if prompt else 0.0,
            "blocks": self._scheduler.block_manager.num_blocks,
            "peak of held blocks": self._peak,
            "preemptions": sum(map(len, self.steps["preempted"])),
        }

    def data(self) -> dict[str, Any]:
        """All that the page draws."""
        header = header_fields(self._scheduler)
        return {
            "settings": {**header["pool"], **header["scheduler"]},
            "summary": self.summary(),
            "sequences": self.sequences,
            "steps": self.steps,
        }

    def _add(self, sequence: Sequence) -> None:
        self.sequences[sequence.seq_id] = {
            "request": sequence.request_id,
            "index": sequence.index,
            "prompt": sequence.num_prompt_tokens,
            "cached": None,
            "preemptions": 0,
            "added": len(self.steps["start"]),
            "ended": None,
            "reason": None,
        }

    def _add_pin(self, pin: int) -> None:
        """Drawn as a sequence with a number below 0."""
        stand_in = Sequence(-pin, "pin", pin, [], SamplingParams())
        stand_in.block_table = self._scheduler.block_manager.pins[pin]
        self._pins[pin] = stand_in
        self._add(stand_in)

    def _end(self, seq_id: int, reason: str) -> None:
        self.sequences[seq_id].update(ended=len(self.steps["start"]), reason=reason)

    def _add_step(self, event: dict[str, Any], sequences: Mapping[int, Sequence]) -> None:
        scheduler = self._scheduler
        allocator = scheduler.block_manager.allocator
        num_decodes = event.get("decodes", 0)
        prefills = [[seq_id, count] for seq_id, count, _ in event["scheduled"][num_decodes:]]
        for seq_id, _ in prefills:
            if self.sequences[seq_id]["cached"] is None:
                self.sequences[seq_id]["cached"] = sequences[seq_id].num_cached_tokens
        preempted = event.get("preempted", [])
        for seq_id in preempted:
            self.sequences[seq_id]["preemptions"] += 1
        self._peak = max(self._peak, allocator.num_active)
        tables, to_free, to_cached = self._table_changes()
        values = (
            _seconds(event),
            None,
            int("behind" in event),
            num_decodes,
            prefills,
            preempted,
            *(len(event.get(copies, [])) for copies in ("block_copies", "swap_outs", "swap_ins")),
            scheduler.num_running,
            scheduler.num_waiting,
            allocator.num_active,
            allocator.num_cached,
            tables,
            to_free,
            to_cached,
        )
        for name, value in zip(COLUMNS, values, strict=True):
            self.steps[name].append(value)

    def _table_changes(self) -> tuple[list[list[Any]], list[int], list[int]]:
        changes: list[list[Any]] = []
        left: set[int] = set()
        candidates = {s.seq_id: s for s, _ in self._holders.values()}
        candidates |= {s.seq_id: s for s in (*self._pins.values(), *self._scheduler.running)}
        for seq_id, sequence in candidates.items():
            change = self._table_change(sequence)
            if change is None:
                continue
            changes.append(change)
            _, place, blocks = change
            _, table = self._holders.pop(seq_id, (sequence, []))
            left.update(block for block in table[place:] if block is not None)
            table[place:] = blocks
            if table:
                self._holders[seq_id] = sequence, table
            else:
                self._tables.forget([sequence])
        allocator = self._scheduler.block_manager.allocator
        states = [(block, allocator.state(block)) for block in sorted(left)]
        return (
            changes,
            [block for block, state in states if state == BlockState.FREE],
            [block for block, state in states if state == BlockState.CACHED],
        )

    def _table_change(self, sequence: Sequence) -> list[Any] | None:
        change = self._tables.of(sequence)
        table, freed = sequence.block_table, sequence.num_freed_blocks
        _, known = self._holders.get(sequence.seq_id, (sequence, []))
        place = len(known) if change is None else change[1]
        if known.count(None) < freed:
            place = min(place, known.count(None))
        elif change is None:
            return None
        return [sequence.seq_id, place, [None] * (freed - place) + table[max(place, freed) :]]


def _seconds(event: dict[str, Any]) -> float | None:
    time = event.get("time")
    return time if isinstance(time, (int, float)) and math.isfinite(time) else None


def write_page(path: str, picture: Picture) -> None:
    """A page of its own, which loads nothing; OSError where the file cannot be written."""
    page = (Path(__file__).parent / "replay.html").read_text(encoding="utf-8")
    data = json.dumps(picture.data(), separators=(",", ":")).replace("<", "\\u003c")
    Path(path).write_text(page.replace("__DATA__", data), encoding="utf-8")
