"""What passes between Engine and Scheduler, as lines of JSON: `bench replay` decides it all again,
without a model.

The first line is a header, each other one a call: what went in, and what the scheduler decided. To
extend: a new field of Batch is part of decisions by itself, as are a new argument of Scheduler and
BlockManager of the header, if kept under its name. What scheduling reads of a Sequence or of
SamplingParams goes into `sequence_fields` and `make_sequence`, of a StepResult into `result_fields`
and `make_result`; a new call into RecordedScheduler, and into the handlers of bench/replay.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any, TextIO

from nano_vllm._core import DecodeStep
from nano_vllm.batch import Batch, ScheduledSequence, StepResult
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.cache.ledger import Leak
from nano_vllm.engine.beam_group import BeamGroup
from nano_vllm.engine.prefill_pace import PrefillPace
from nano_vllm.engine.scheduler import Scheduler
from nano_vllm.logprob import Logprob
from nano_vllm.sampling.beam_search import BeamSearch
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence

FORMAT = "nano_vllm events"
VERSION = 1
SCHEDULING_PARAMS = ("max_tokens", "min_tokens", "prompt_logprobs")
"""Of SamplingParams, what scheduling depends on."""
NUM_BATCHES = 4
"""The last batches, one of which the next call may name; a pipeline has more under way."""


class RecordedScheduler:
    """A scheduler whose calls from outside are written down; in all else that scheduler itself.

    Equal calls and decisions give equal lines, but for their times.

    Args:
        scheduler: has not been called yet.
        out: gets the lines; OSError where it does.
        clock: seconds, from any start.
    """

    def __init__(self, scheduler: Scheduler, out: TextIO, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._out = out
        self._clock = clock
        self._tables = TableChanges()
        self._roots = {b"": 0}
        """Cache roots, numbered as they come: they are made with a secret of the process."""
        self._num_batches = 0
        self.batches: dict[int, Batch] = {}
        """The last ones, by their number among all."""
        self._num_kept = NUM_BATCHES + scheduler.num_stages
        self._write_line(header_fields(scheduler))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def add(self, sequences: list[Sequence], beams: BeamGroup | None = None) -> None:
        self._scheduler.add(sequences, beams)
        first, *others = (sequence_fields(sequence, self._roots) for sequence in sequences)
        # The prompt stands there once.
        others = [{k: v for k, v in each.items() if v != first[k]} for each in others]
        searched = {} if beams is None else {"search": search_fields(beams.search)}
        self._write("add", sequences=[first, *others], **searched)

    def abort(self, request_id: str) -> list[Sequence]:
        ended = self._scheduler.abort(request_id)
        self._write("abort", request=request_id, ended=_plain(ended))
        self._tables.forget(ended)
        return ended

    def finish(
        self, sequence: Sequence, finish_reason: str, stop_reason: int | str | None = None
    ) -> None:
        self._scheduler.finish(sequence, finish_reason, stop_reason)
        self._write("finish", sequence=sequence.seq_id, reason=finish_reason, stop=stop_reason)
        self._tables.forget([sequence])

    def schedule(self) -> Batch | None:
        batch = self._scheduler.schedule()
        self._write("schedule", **self._decision(batch))
        return batch

    def schedule_ahead(self, batch: Batch) -> Batch | None:
        ahead = self._scheduler.schedule_ahead(batch)
        self._write("schedule_ahead", behind=self._number(batch), **self._decision(ahead))
        return ahead

    def observe(self, batch: Batch, seconds: float) -> None:
        self._scheduler.observe(batch, seconds)
        if self._scheduler.prefill_pace is not None:
            self._write("observe", step=self._number(batch), seconds=seconds)

    def update(self, batch: Batch, result: StepResult) -> list[Sequence]:
        searching = [row for row in result.logprobs if self.searches(batch.scheduled[row].sequence)]
        noticed = self._scheduler.update(batch, result)
        pairs = [[sequence.seq_id, sequence.finish_reason] for sequence in noticed]
        fields = result_fields(result, searching)
        self._write("update", step=self._number(batch), **fields, noticed=pairs)
        self._tables.forget([sequence for sequence in noticed if sequence.is_finished])
        return noticed

    def retract(self, batch: Batch) -> None:
        self._scheduler.retract(batch)
        self._write("retract", step=self._number(batch))

    def pin(self, token_ids: list[int], cache_root: bytes) -> int:
        pin = None
        try:
            pin = self._scheduler.pin(token_ids, cache_root)
            return pin
        finally:  # a refused one has looked for blocks too, which are then the last to be evicted
            root = self._roots.setdefault(cache_root, len(self._roots))
            self._write("pin", tokens=token_ids, root=root, pin=pin)

    def unpin(self, pin: int) -> None:
        self._scheduler.unpin(pin)
        self._write("unpin", pin=pin)

    def reclaim_leaks(self) -> list[Leak]:
        leaks = self._scheduler.reclaim_leaks()
        if leaks:
            self._write("reclaim_leaks", leaks=[dataclasses.astuple(leak) for leak in leaks])
        return leaks

    def close(self) -> None:
        self._out.close()

    def _number(self, batch: Batch) -> int:
        return next(number for number, own in self.batches.items() if own is batch)

    def _decision(self, batch: Batch | None) -> dict[str, Any]:
        if batch is None:
            return {"step": None}
        number = self._num_batches
        self._num_batches += 1
        self.batches[number] = batch
        self.batches.pop(number - self._num_kept, None)
        return {"step": number, **batch_fields(batch, self._tables)}

    def _write(self, event: str, **fields: Any) -> None:
        self._write_line({"event": event, "time": round(self._clock(), 6), **fields})

    def _write_line(self, fields: dict[str, Any]) -> None:
        if not self._out.closed:  # an engine that is closed may be asked to abort
            self._out.write(json.dumps(fields, separators=(",", ":")) + "\n")


def record_to_file(
    scheduler: Scheduler, path: str, clock: Callable[[], float]
) -> RecordedScheduler:
    """OSError where the file cannot be written. `close` writes what is left."""
    out = open(path, "w", encoding="ascii", buffering=1 << 16)  # noqa: SIM115
    return RecordedScheduler(scheduler, out, clock)


class TableChanges:
    """What has changed in block tables since it was last asked for.

    A table grows in place, has its last block replaced or is another list.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[list[int] | None, int, int]] = {}
        """Of a sequence's table: the list, which is kept so that no other takes its address; its
        length; its last block.
        """

    def of(self, sequence: Sequence) -> list[Any] | None:
        """[seq_id, place, blocks]: from that place on the table has these blocks, and no others;
        None for no change.
        """
        table = sequence.block_table
        seen, length, last = self._seen.get(sequence.seq_id, (None, 0, -1))
        start = length
        if table is not seen or len(table) < length:
            start = 0
        elif length and table[length - 1] != last:
            start = length - 1
        if start == length == len(table):
            return None
        self._seen[sequence.seq_id] = (table, len(table), table[-1] if table else -1)
        return [sequence.seq_id, start, table[start:]]

    def forget(self, sequences: list[Sequence]) -> None:
        """They have ended."""
        for sequence in sequences:
            self._seen.pop(sequence.seq_id, None)


def header_fields(scheduler: Scheduler) -> dict[str, Any]:
    settings = _settings(scheduler, leave_out="block_manager")
    if scheduler.prefill_pace is not None:
        pace = scheduler.prefill_pace
        settings["prefill_pace"] = {
            "limit": pace.limit,
            "saturating_tokens": pace.cost.saturating_tokens,
            "spread": pace.spread,
            "padded": list(pace.padded),
        }
    return {
        "format": FORMAT,
        "version": VERSION,
        "pool": _settings(scheduler.block_manager, leave_out="hash_key"),
        "scheduler": settings,
    }


def make_scheduler(header: dict[str, Any]) -> Scheduler:
    settings = dict(header["scheduler"])
    if settings.get("prefill_pace") is not None:
        settings["prefill_pace"] = PrefillPace(**settings["prefill_pace"])
    return Scheduler(BlockManager(**header["pool"]), **settings)


def _settings(made: object, leave_out: str) -> dict[str, Any]:
    """The arguments that it was made with, which it keeps under their names."""
    names = inspect.signature(type(made)).parameters
    return {name: getattr(made, name) for name in names if name != leave_out}


def sequence_fields(sequence: Sequence, roots: dict[bytes, int]) -> dict[str, Any]:
    """`roots` gets a number for a cache root that it does not have yet."""
    return {
        "id": sequence.seq_id,
        "request": sequence.request_id,
        "index": sequence.index,
        "prompt": sequence.token_ids[: sequence.num_prompt_tokens],
        "ends": sorted(sequence.end_token_ids),
        "followed": sequence.is_followed,
        "streamed": sequence.is_streamed,
        "priority": sequence.priority,
        "root": roots.setdefault(sequence.cache_root, len(roots)),
        "params": {name: getattr(sequence.params, name) for name in SCHEDULING_PARAMS},
    }


def make_sequence(fields: dict[str, Any]) -> Sequence:
    sequence = Sequence(
        fields["id"],
        fields["request"],
        fields["index"],
        fields["prompt"],
        SamplingParams(**fields["params"]),
        frozenset(fields["ends"]),
    )
    sequence.is_followed = fields["followed"]
    sequence.is_streamed = fields.get("streamed", False)
    sequence.priority = fields["priority"]
    sequence.cache_root = make_root(fields["root"])
    return sequence


def make_root(number: int) -> bytes:
    """Another one than was recorded, but equal for equal ones."""
    return number.to_bytes(16, "big") if number else b""


def search_fields(search: BeamSearch) -> dict[str, Any]:
    return {
        "params": dataclasses.asdict(search.params),
        "ends": sorted(search.end_token_ids),
        "max_tokens": search.max_tokens,
    }


def make_search(fields: dict[str, Any]) -> BeamSearch:
    return BeamSearch(
        BeamSearchParams(**fields["params"]), frozenset(fields["ends"]), fields["max_tokens"]
    )


def batch_fields(batch: Batch, tables: TableChanges) -> dict[str, Any]:
    """A decision: all fields that hold something, and what its sequences' tables have gained."""
    fields = {f.name: _plain(getattr(batch, f.name)) for f in dataclasses.fields(Batch)}
    decision = {name: value for name, value in fields.items() if value is not None and value != []}
    changes = (tables.of(scheduled.sequence) for scheduled in batch.scheduled)
    decision["blocks"] = [change for change in changes if change is not None]
    return decision


def _plain(value: Any) -> Any:
    """A sequence as its id, a scheduled one as [id, num_tokens, samples], a DecodeStep as its
    length.
    """
    if isinstance(value, ScheduledSequence):
        return [value.sequence.seq_id, value.num_tokens, int(value.samples)]
    if isinstance(value, Sequence):
        return value.seq_id
    if isinstance(value, DecodeStep):
        return len(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def result_fields(result: StepResult, searching: list[int]) -> dict[str, Any]:
    """Of the log-probabilities those by which beams are chosen, in the rows `searching`; of the
    others scheduling knows the number alone.
    """
    fields: dict[str, Any] = {"tokens": result.token_ids}
    if result.failures:
        fields["failures"] = [list(failure) for failure in result.failures.items()]
    if result.prompt_logprobs:
        fields["prompt_logprobs"] = [[row, len(e)] for row, e in result.prompt_logprobs.items()]
    if searching:
        fields["candidates"] = [
            [row, [[token, entry.logprob] for token, entry in result.logprobs[row].items()]]
            for row in searching
        ]
    return fields


def make_result(fields: dict[str, Any]) -> StepResult:
    return StepResult(
        fields["tokens"],
        dict(fields.get("failures", ())),
        logprobs={
            row: {token: Logprob(logprob) for token, logprob in entries}
            for row, entries in fields.get("candidates", ())
        },
        prompt_logprobs={row: [{}] * count for row, count in fields.get("prompt_logprobs", ())},
    )
