"""What an engine with --record scheduled, decided again by this scheduler, without a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nano_vllm.sequence import Sequence

MISSING = "nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="what --record wrote")
    parser.add_argument(
        "--html", metavar="FILE", help="draw the blocks and the steps, as a page that needs no net"
    )


def run(args: argparse.Namespace) -> None:
    from nano_vllm.bench.replay_picture import Picture, write_page

    trace = Trace(args.trace)
    replay = Replay(trace.header)
    picture = Picture(replay.scheduler)
    try:
        if args.html is not None:
            open(args.html, "a").close()
        for number, event in enumerate(trace.events(), 1):
            replay.check(number, event)
            picture.see(event, replay.sequences)
        if args.html is not None:
            write_page(args.html, picture)
    except OSError as error:
        raise ValueError(f"cannot write: {error}")
    summary = picture.summary()
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    print(json.dumps({"benchmark": "replay", "trace": args.trace, **summary}))
    if trace.is_cut_off:
        raise ValueError(f"{args.trace} is cut off; what is whole of it was replayed")


class Trace:
    """A file that an engine with --record wrote.

    Raises ValueError, in one line, for a file that cannot be read, is no trace, or of another
    version.
    """

    def __init__(self, path: str) -> None:
        from nano_vllm.engine.event_log import FORMAT, VERSION

        self.path = path
        self.is_cut_off = False
        """Set by `events`: the last line is not whole."""
        self._lines = self._read()
        self.header = next(self._lines, {})
        if self.header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a trace: its first line is no header of one")
        if self.header.get("version") != VERSION:
            raise ValueError(
                f"{path} is a trace of version {self.header.get('version')!r}, "
                f"this is a reader of version {VERSION}"
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """Those behind the header, once."""
        return self._lines

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self.path, encoding="ascii", errors="replace") as lines:
                for number, line in enumerate(lines):
                    event = _parse(line)
                    if event is not None:
                        yield event
                    elif line.endswith("\n"):
                        raise ValueError(
                            f"{self.path} is not a trace: line {number + 1} is no event"
                        )
                    else:
                        self.is_cut_off = True
        except OSError as error:
            raise ValueError(f"cannot read: {error}")


def _parse(line: str) -> dict[str, Any] | None:
    """The object that the line holds, if it does."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Replay:
    """A scheduler that gets the calls of a trace, each of which is recorded anew.

    Args:
        header: of the trace; ValueError where no scheduler can be made by it.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        from nano_vllm.engine.event_log import RecordedScheduler, make_scheduler

        try:
            self.scheduler = make_scheduler(header)
        except Exception as error:  # whatever the file's values lead to
            raise ValueError(f"the trace's header makes no scheduler: {error!r}") from error
        self.sequences: dict[int, Sequence] = {}
        """Those that have not ended, by their ids."""
        self._out = StringIO()
        self._recorded = RecordedScheduler(self.scheduler, self._out, lambda: 0.0)
        self._handlers = {
            "add": self._add,
            "abort": self._abort,
            "finish": self._finish,
            "schedule": self._schedule,
            "schedule_ahead": self._schedule_ahead,
            "update": self._update,
            "retract": self._retract,
            "observe": self._observe,
            "pin": self._pin,
            "unpin": self._unpin,
            "reclaim_leaks": self._reclaim_leaks,
        }

    def play(self, event: dict[str, Any]) -> str:
        """The line that the same call gives now, at time 0."""
        self._out.seek(0)
        self._out.truncate()
        self._handlers[event["event"]](event)
        return self._out.getvalue()

    def check(self, number: int, event: dict[str, Any]) -> None:
        """Raise ValueError, with both, where the scheduler decides otherwise than the event says.

        Args:
            number: of the event, for errors; the first is 1.
            event: behind all that came before it.
        """
        place = f"event {number}, {event.get('event')}"
        try:
            got = json.loads(self.play(event))
        except Exception as error:  # whatever the file's values lead to
            raise ValueError(f"{place}: cannot be replayed: {error!r}") from error
        expected = {**event, "time": 0.0}
        if got != expected:
            raise ValueError(f"{place}: {_difference(expected, got)}")

    def _add(self, event: dict[str, Any]) -> None:
        from nano_vllm.engine.beam_group import BeamGroup
        from nano_vllm.engine.event_log import make_search, make_sequence

        first = event["sequences"][0]
        sequences = [make_sequence({**first, **fields}) for fields in event["sequences"]]
        search = event.get("search")
        beams = None if search is None else BeamGroup(make_search(search), sequences)
        self._recorded.add(sequences, beams)
        self.sequences.update((sequence.seq_id, sequence) for sequence in sequences)

    def _abort(self, event: dict[str, Any]) -> None:
        self._drop_ended(self._recorded.abort(event["request"]))

    def _finish(self, event: dict[str, Any]) -> None:
        sequence = self.sequences[event["sequence"]]
        self._recorded.finish(sequence, event["reason"], event["stop"])
        self._drop_ended([sequence])

    def _schedule(self, event: dict[str, Any]) -> None:
        self._recorded.schedule()

    def _schedule_ahead(self, event: dict[str, Any]) -> None:
        self._recorded.schedule_ahead(self._recorded.batches[event["behind"]])

    def _update(self, event: dict[str, Any]) -> None:
        from nano_vllm.engine.event_log import make_result

        batch = self._recorded.batches[event["step"]]
        self._drop_ended(self._recorded.update(batch, make_result(event)))

    def _retract(self, event: dict[str, Any]) -> None:
        self._recorded.retract(self._recorded.batches[event["step"]])

    def _observe(self, event: dict[str, Any]) -> None:
        self._recorded.observe(self._recorded.batches[event["step"]], event["seconds"])

    def _pin(self, event: dict[str, Any]) -> None:
        from nano_vllm.engine.event_log import make_root

        with suppress(ValueError):  # refused, as it was
            self._recorded.pin(event["tokens"], make_root(event["root"]))

    def _unpin(self, event: dict[str, Any]) -> None:
        self._recorded.unpin(event["pin"])

    def _reclaim_leaks(self, event: dict[str, Any]) -> None:
        self._recorded.reclaim_leaks()

    def _drop_ended(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.is_finished:
                del self.sequences[sequence.seq_id]


def _difference(expected: dict[str, Any], got: dict[str, Any]) -> str:
    """Where two events that are not equal first differ, and how."""
    for name in {**expected, **got}:
        one, other = (event.get(name, MISSING) for event in (expected, got))
        if one == other:
            continue
        if isinstance(one, list) and isinstance(other, list):
            pairs = enumerate(zip_longest(one, other, fillvalue=MISSING))
            place, (one, other) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            name = f"{name}[{place}]"
        return f"{name}: expected {_short(one)}, got {_short(other)}"
    raise AssertionError("equal events")


def _short(value: Any) -> str:
    text = value if value is MISSING else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
