"""What an engine recorded is decided again, and drawn as it was."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nano_vllm._core import BlockState
from nano_vllm.batch import Batch, StepResult
from nano_vllm.bench.__main__ import main
from nano_vllm.bench.replay import Replay, Trace
from nano_vllm.bench.replay_picture import Picture
from nano_vllm.engine import event_log
from nano_vllm.engine.scheduler import Scheduler
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from nano_vllm.sequence import Sequence
from tests.engine.fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    StepBroke,
    make_engine,
    make_tokenizer,
)

TOKENIZER = make_tokenizer()
MAX_MODEL_LEN = 64
STOP_STRINGS = ["a", "b", "c", "d", "e", "f", "g"]
HEADER = {
    "format": event_log.FORMAT,
    "version": event_log.VERSION,
    "pool": {"num_blocks": 8, "block_size": 8, "enable_prefix_caching": True},
    "scheduler": {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 64},
}


class Runner(FakeRunner):
    """Gives log-probabilities of prompts too, without any in them."""

    def _execute(self, batch: Batch) -> StepResult:
        result = super()._execute(batch)
        for row, scheduled in enumerate(batch.scheduled[batch.num_decodes :], batch.num_decodes):
            sequence = scheduled.sequence
            missing = sequence.num_prompt_tokens - 1 - sequence.num_computed_tokens
            if sequence.params.prompt_logprobs is not None and missing > 0:
                result.prompt_logprobs[row] = [{}] * min(missing, scheduled.num_tokens)
        return result


def run(seed: int, path: Path | None) -> tuple[dict[str, Any], dict[str, int]]:
    """A random run, which is recorded if there is a path: its outputs by request, and how often
    what happened.
    """
    draw = random.Random(seed)
    runner = Runner(
        num_blocks=draw.choice([8, 10, 24, 200]),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=draw.choice([16, 64]),
        failing=["r3"],
        runs_ahead=draw.random() < 0.7,
        num_host_blocks=draw.choice([0, 4, 40]),
    )
    engine = make_engine(
        runner,
        TOKENIZER,
        clock=lambda: float(len(runner.batches)),  # recording reads the clock too
        record=None if path is None else str(path),
        max_num_seqs=draw.choice([2, 16]),
        enable_chunked_prefill=runner.max_num_batched_tokens < 64 or draw.random() < 0.5,
        enable_prefix_caching=draw.random() < 0.7,
        scheduling_policy=draw.choice(["fcfs", "priority"]),
    )
    head = [draw.randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)]
    outputs: dict[str, Any] = {}
    aborted, broken, to_come, pin = 0, 0, 12, None
    while to_come or engine.has_work:
        while to_come and draw.random() < (0.4 if engine.has_work else 1.0):
            to_come -= 1
            length = draw.randrange(1, MAX_MODEL_LEN)
            prompt = head[: draw.randrange(length)]
            prompt += [draw.randrange(VOCAB_SIZE) for _ in range(length - len(prompt))]
            urgency, salt = draw.randrange(3), draw.choice([None, None, "salt", "pepper"])
            if engine.config.scheduling_policy == "fcfs":
                urgency = 0
            if draw.random() < 0.2:
                search = BeamSearchParams(beam_width=2, max_tokens=draw.choice([1, 8]))
                engine.add(
                    engine.make_beam_request(f"r{to_come}", prompt, search, None, urgency, salt)
                )
                continue
            params = SamplingParams(
                n=draw.choice([1, 1, 2, 4]),
                seed=draw.randrange(100),
                max_tokens=draw.choice([4, 30, None]),
                min_tokens=draw.choice([0, 3]),
                ignore_eos=draw.random() < 0.5,
                stop_token_ids=draw.choice([None, [*range(30)]]),
                stop=draw.choice([None, STOP_STRINGS]),
                prompt_logprobs=draw.choice([None, None, 0]),
            )
            engine.add_request(
                f"r{to_come}",
                prompt,
                params,
                stream=draw.random() < 0.3,
                priority=urgency,
                cache_salt=salt,
            )
        if draw.random() < 0.03:
            runner.breaks = draw.choice(["before", "after", "late", "lost"])
        try:
            outputs.update((o.request_id, o) for o in engine.step() if o.finished)
        except StepBroke:
            broken += 1
        if engine.config.enable_prefix_caching and draw.random() < 0.1:
            if pin is not None:
                engine.unpin(pin)
            pin = None
            with contextlib.suppress(ValueError):
                pin = engine.pin(head, draw.choice([None, "salt"]))
        if draw.random() < 0.05:
            aborted += engine.abort(f"r{draw.randrange(12)}") is not None
    metrics = engine.get_metrics()
    engine.close()
    completions = [c for output in outputs.values() for c in output.outputs]
    return outputs, {
        "preempted": metrics.num_preemptions,
        "cached": metrics.num_cached_tokens,
        "copied": sum(len(batch.block_copies) for batch in runner.batches),
        "ahead": sum(batch.lead for batch in runner.batches),
        "chunked": sum(not s.samples for batch in runner.batches for s in batch.scheduled),
        "searched": sum(c.cumulative_logprob is not None for c in completions),
        "failed": sum(c.stop_reason == "not finite" for c in completions),
        "stopped": sum(
            c.finish_reason == "stop" and c.stop_reason is not None for c in completions
        ),
        "aborted": aborted,
        "broken": broken,
        "swapped out": sum(len(batch.swap_outs) for batch in runner.batches),
        "swapped in": sum(len(batch.swap_ins) for batch in runner.batches),
    }


@pytest.fixture
def traces(tmp_path: Path, seed: int) -> list[Path]:
    paths = [tmp_path / f"{i}.jsonl" for i in range(20)]
    for i, path in enumerate(paths):
        run(seed + i, path)
    return paths


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """With a preemption among its first events."""
    path = tmp_path / "trace.jsonl"
    runner = FakeRunner(num_blocks=8, max_model_len=MAX_MODEL_LEN)
    engine = make_engine(runner, record=str(path))
    for i in range(3):
        params = SamplingParams(max_tokens=30, ignore_eos=True, seed=i)
        engine.add_request(f"r{i}", list(range(20 * i, 20 * i + 15)), params)
    while engine.has_work:
        engine.step()
    engine.close()
    assert engine.get_metrics().num_preemptions
    return path


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, events: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a replay that fails."""
    assert main(["replay", *map(str, argv)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


def test_every_decision_is_made_again(tmp_path: Path, seed: int) -> None:
    """Byte for byte, but for the clock; and recording changes nothing."""
    happened: dict[str, int] = {}
    names = set()
    for i in range(60):
        path = tmp_path / "trace.jsonl"
        outputs, counts = run(seed + i, path)
        for name, count in counts.items():
            happened[name] = happened.get(name, 0) + count
        trace = Trace(str(path))
        replay = Replay(trace.header)
        picture = Picture(replay.scheduler)
        for number, event in enumerate(trace.events(), 1):
            names.add(event["event"])
            if i % 2:
                replay.check(number, event)
            else:
                expected = json.dumps({**event, "time": 0.0}, separators=(",", ":")) + "\n"
                assert replay.play(event) == expected
            picture.see(event, replay.sequences)
        assert not replay.sequences
        assert not replay.scheduler.has_work
        assert picture.summary()["preemptions"] >= counts["preempted"]
        again, _ = run(seed + i, None)
        assert {r: o.outputs for r, o in again.items()} == {
            r: o.outputs for r, o in outputs.items()
        }
    assert all(happened.values()), f"the runs lack variety: {happened}"
    assert names == set(Replay(HEADER)._handlers) - {"reclaim_leaks"}


def test_equal_runs_give_equal_bytes(tmp_path: Path, seed: int) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    for path in paths:
        run(seed, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_every_call_is_recorded_or_changes_nothing() -> None:
    calls = {name for name, value in vars(Scheduler).items() if callable(value) and name[0] != "_"}
    calls -= {"check_fits", "searches"}
    assert calls <= set(vars(event_log.RecordedScheduler))
    assert calls == set(Replay(HEADER)._handlers)


def test_without_record_there_is_a_scheduler_and_nothing_else() -> None:
    assert type(make_engine(FakeRunner()).scheduler) is Scheduler


def test_an_engine_that_is_closed_may_be_asked_to_abort(tmp_path: Path) -> None:
    engine = make_engine(FakeRunner(), record=str(tmp_path / "trace.jsonl"))
    engine.close()
    assert engine.abort("r") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_once_the_memory_is_back() -> None:
    runner = FakeRunner()
    engine = make_engine(runner, record="/dev/full")
    with pytest.raises(OSError, match="No space left"):
        engine.close()
    assert runner.is_closed


def test_summary(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    events = events_of(trace)[1:]
    decisions = [event for event in events if event.get("scheduled")]
    assert result["events"] == len(events)
    assert result["steps"] == len(decisions)
    assert result["preemptions"] == sum(len(event.get("preempted", [])) for event in decisions)
    assert (result["sequences"], result["prompt tokens"], result["hit rate"]) == (3, 45, 0.0)
    assert (result["blocks"], result["peak of held blocks"]) == (8, 8)


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("scheduled", [[0, 15, 1], [1, 14, 0]]),
        ("blocks", [[0, 0, [0, 2]]]),
        ("noticed", [[1, "length"]]),
        ("preempted", [0]),
        ("decodes", 1),
        ("swap_out", [[1, 2]]),
    ],
)
def test_a_changed_decision_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], field: str, changed: object
) -> None:
    events = events_of(trace)
    number = next((i for i, event in enumerate(events) if event.get(field)), 2)
    recorded = events[number].get(field, "nothing")
    events[number][field] = changed
    write(trace, events)
    line = failure(capsys, trace)
    assert line.startswith(f"error: event {number}, {events[number]['event']}: {field}")
    if isinstance(changed, list) and isinstance(recorded, list):
        place, (expected, got) = next(
            (i, pair)
            for i, pair in enumerate(itertools.zip_longest(changed, recorded))
            if pair[0] != pair[1]
        )
        assert f"{field}[{place}]: expected {json.dumps(expected)}, got {json.dumps(got)}" in line
    else:
        assert f"{field}: expected {json.dumps(changed)}, got {recorded}" in line


def test_a_time_is_no_decision(trace: Path) -> None:
    events = events_of(trace)
    for event in events[1:]:
        event["time"] = -5.5
    write(trace, events)
    assert main(["replay", str(trace)]) == 0


def test_another_scheduler_is_found_out(
    trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that preempts the sequence before the last."""

    def before_the_last(self: Scheduler) -> Sequence:
        return sorted(self._running, key=self.waiting.order)[-2]

    monkeypatch.setattr(Scheduler, "_last_to_come", before_the_last)
    line = failure(capsys, trace)
    assert re.match(r"error: event \d+, schedule: \w+(\[\d+\])?: expected .+, got .+", line)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is not a trace"),
        (["\x00\xff\x7fELF"], "is not a trace"),
        (["[" * 100_000], "is not a trace"),
        (['{"traceEvents": []}'], "is not a trace"),
        (
            [json.dumps({**HEADER, "version": 2})],
            "is a trace of version 2, this is a reader of ver",
        ),
        ([json.dumps({**HEADER, "pool": {}})], "the trace's header makes no scheduler: TypeError"),
        ([json.dumps({**HEADER, "pool": {"num_blocks": 0, "block_size": 8}})], "num_blocks"),
        ([json.dumps(HEADER), "nonsense"], "is not a trace: line 2 is no event"),
        ([json.dumps(HEADER), "{}"], "event 1, None: cannot be replayed: KeyError('event')"),
        ([json.dumps(HEADER), '{"event":"melt"}'], "event 1, melt: cannot be replayed"),
        (
            [json.dumps(HEADER), '{"event":"update","step":0,"tokens":[]}'],
            "event 1, update: cannot",
        ),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="latin-1")
    assert message in failure(capsys, path)


def test_files_that_are_not_there_are_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot read: " in failure(capsys, "/no/such.jsonl")
    assert "cannot write: " in failure(capsys, trace, "--html", "/no/such.html")


def test_a_trace_that_is_cut_off_is_replayed_as_far_as_it_goes(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = trace.read_text()
    trace.write_text(text[:-20])
    page = tmp_path / "page.html"
    assert f"{trace} is cut off" in failure(capsys, trace, "--html", page)
    assert len(page_data(page)["steps"]["start"]) > 10
    trace.write_text(text[:-1])
    assert main(["replay", str(trace)]) == 0, "the last line is whole"


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def page_data(path: Path) -> dict[str, Any]:
    return json.loads(Page(path).texts["script"][0])


def test_the_page_needs_nothing_else(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert main(["replay", str(trace), "--html", str(path)]) == 0
    page = Page(path)
    assert page.open == []
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    text = path.read_text(encoding="utf-8")
    for loads in ("http:", "https:", "//cdn", "url(", "@import", "fetch(", "import(", "innerHTML"):
        assert loads not in text
    assert "__DATA__" not in text


def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>&\u2028\"'__DATA__"
    path, page = tmp_path / "trace.jsonl", tmp_path / "page.html"
    engine = make_engine(FakeRunner(), record=str(path))
    engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=2))
    while engine.has_work:
        engine.step()
    engine.close()
    assert main(["replay", str(path), "--html", str(page)]) == 0
    assert page_data(page)["sequences"]["0"]["request"] == name
    assert len(Page(page).texts["script"]) == 2
    assert "<img" not in page.read_text(encoding="utf-8")


def test_the_page_has_every_block_as_it_was(traces: list[Path]) -> None:
    """Put together from what changed, beside all blocks looked at in each step."""
    for path in traces:
        trace = Trace(str(path))
        replay = Replay(trace.header)
        picture = Picture(replay.scheduler)
        allocator = replay.scheduler.block_manager.allocator
        blocks = range(allocator.num_blocks)
        seen: list[list[Any]] = []
        for number, event in enumerate(trace.events(), 1):
            replay.check(number, event)
            picture.see(event, replay.sequences)
            if event.get("scheduled"):
                held: dict[int, set[int]] = {block: set() for block in blocks}
                for sequence in replay.scheduler.running:
                    for block in sequence.block_table:
                        held[block].add(sequence.seq_id)
                for pin, pinned in replay.scheduler.block_manager.pins.items():
                    for block in pinned:
                        held[block].add(-pin)
                states = [allocator.state(block) == BlockState.CACHED for block in blocks]
                seen.append([held[block] or states[block] for block in blocks])
        steps = json.loads(json.dumps(picture.data()))["steps"]
        assert len(seen) == len(steps["tables"]) > 5
        tables: dict[int, list[int]] = {}
        cached = [False for _ in blocks]
        for step, expected in enumerate(seen):
            for seq_id, place, changed in steps["tables"][step]:
                tables.setdefault(seq_id, [])[place:] = changed
            for block in steps["to_free"][step]:
                cached[block] = False
            for block in steps["to_cached"][step]:
                cached[block] = True
            holders: dict[int, set[int]] = {block: set() for block in blocks}
            for seq_id, table in tables.items():
                for block in table:
                    holders[block].add(seq_id)
            assert [holders[b] or cached[b] for b in blocks] == expected
            counts = [sum(map(bool, holders.values())), steps["active"][step]]
            assert counts[0] == counts[1]


def test_a_table_that_changes_in_any_way_is_recorded() -> None:
    fields = {"id": 7, "request": "r", "index": 0, "prompt": [1], "ends": [], "followed": False}
    sequence = event_log.make_sequence({**fields, "priority": 0, "root": 0, "params": {}})
    changes = event_log.TableChanges()
    assert changes.of(sequence) is None
    sequence.block_table += [4, 5]
    assert changes.of(sequence) == [7, 0, [4, 5]]
    assert changes.of(sequence) is None
    sequence.block_table.append(6)
    assert changes.of(sequence) == [7, 2, [6]]
    sequence.block_table[-1] = 9
    assert changes.of(sequence) == [7, 2, [9]]
    sequence.block_table = [4, 5, 9]
    assert changes.of(sequence) == [7, 0, [4, 5, 9]]
    del sequence.block_table[1:]
    assert changes.of(sequence) == [7, 0, [4]]
    sequence.block_table = []
    assert changes.of(sequence) == [7, 0, []]
    assert changes.of(sequence) is None
