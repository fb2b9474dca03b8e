"""The engine's loop between its inbox and its outbox, with a runner that needs no model."""

from __future__ import annotations

import asyncio
from typing import Any

from nano_vllm.engine.engine_process import TOKENS_PER_MESSAGE, EngineLoop, parts_of
from nano_vllm.engine.messages import (
    CACHED,
    FIRST_OWNER,
    Abort,
    Add,
    CompletionDelta,
    Deltas,
    Ping,
    Pong,
    Refused,
    RequestDelta,
    Search,
    encode,
    from_engine_decoder,
    to_engine_decoder,
)
from nano_vllm.engine.output_stream import OutputStream
from nano_vllm.logprob import Logprob
from nano_vllm.outputs import RequestMetrics
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.fake_runner import (
    FakeRunner,
    make_engine,
    make_tokenizer,
    reference_beams,
    reference_tokens,
)

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, seed=1)


class Scripted:
    """An inbox whose messages come at given steps of the runner; it ends with them."""

    def __init__(self, runner: FakeRunner, script: dict[int, list[Any]]) -> None:
        self._runner = runner
        self._script = sorted(script.items())

    def empty(self) -> bool:
        return not self._script or self._script[0][0] > len(self._runner.batches)

    def get(self) -> Any:
        if not self._script:
            return None
        _, messages = self._script[0]
        message = messages.pop(0)
        if not messages:
            self._script.pop(0)
        return message


def run(
    script: dict[int, list[Any]], runs_ahead: bool = True, **options: Any
) -> tuple[list[Any], FakeRunner]:
    """What the loop sends, and the runner it used."""
    runner = FakeRunner(max_model_len=128, runs_ahead=runs_ahead)
    sent: list[Any] = []
    engine = make_engine(runner, make_tokenizer(), **options)
    EngineLoop(engine, Scripted(runner, script), sent.append).run()  # type: ignore[arg-type]
    assert engine.get_metrics().num_free_blocks == 64
    return sent, runner


def deltas_of(sent: list[Any], request_id: str) -> list[RequestDelta]:
    steps = [message for message in sent if isinstance(message, Deltas)]
    return [d for step in steps for d in step.requests if d.request_id == request_id]


def test_first_tokens_go_ahead() -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
    adds: dict[int, list[Any]] = {0: [Add("a", [97], params, True), Add("b", [97], params, True)]}
    sent, _ = run(adds | {5: [Add("c", [97], params, True)]})
    steps = [[d.request_id for d in message.requests] for message in sent]
    place = next(i for i, request_ids in enumerate(steps) if "c" in request_ids)
    assert place > 0
    assert steps[place : place + 3] == [["c"], ["a", "b"], ["a", "b", "c"]]


def test_deltas_sum_up_to_the_whole() -> None:
    params = SamplingParams(max_tokens=20, seed=1, n=3)
    sent, _ = run({0: [Add("a", [97], params, True), Add("b", [97], params, False)]})
    streamed = deltas_of(sent, "a")
    (whole,) = deltas_of(sent, "b")
    assert len(streamed) > 5
    assert [delta.finished for delta in streamed] == [False] * (len(streamed) - 1) + [True]
    total = streamed[0]
    for delta in streamed[1:]:
        total.absorb(delta)
    for index, completion in enumerate(sorted(total.completions, key=lambda c: c.index)):
        assert completion == whole.completions[index]
        assert completion.token_ids == reference_tokens([97], params, index, 128)


def test_an_abort_takes_two_steps_at_the_most() -> None:
    for runs_ahead in (False, True):
        sent, runner = run({0: [Add("a", [97], PARAMS, True)], 5: [Abort(["a"])]}, runs_ahead)
        assert len(runner.batches) <= 5 + 2
        assert not deltas_of(sent, "a")[-1].finished


def test_what_cannot_be_served_is_refused_and_harms_nobody() -> None:
    sent, _ = run({0: [Add("a", [500], PARAMS, True), Add("b", [97], PARAMS, False)]})
    refused = [message for message in sent if isinstance(message, Refused)]
    assert [message.request_id for message in refused] == ["a"]
    assert "got 500" in refused[0].message
    assert deltas_of(sent, "b")[0].finished


def test_a_search_reports_its_end_alone() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=12)
    sent, _ = run({0: [Search("a", [97, 98], params)]})
    (delta,) = deltas_of(sent, "a")
    assert delta.finished
    found = [completion.token_ids for completion in delta.completions]
    expected = reference_beams([97, 98], params, 128)
    assert found == [hypothesis.token_ids for hypothesis in expected]
    assert len(found) == 3


def test_a_search_that_is_too_wide_is_refused() -> None:
    sent, _ = run({0: [Search("a", [97], BeamSearchParams(beam_width=300, max_tokens=2))]})
    (refused,) = sent
    assert isinstance(refused, Refused)
    assert "at most max_num_seqs = 256, got 300" in refused.message


def test_the_lowest_priority_goes_first() -> None:
    for policy, priorities, order in (
        ("priority", (5, -1), ["a", "c", "b"]),
        ("fcfs", (0, 0), ["a", "b", "c"]),
    ):
        adds = [
            Add("b", [98], PARAMS, False, priorities[0]),
            Add("c", [99], PARAMS, False, priorities[1]),
        ]
        script = {0: [Add("a", [97], PARAMS, False)], 1: adds}
        sent, _ = run(script, max_num_seqs=1, scheduling_policy=policy)
        steps = [message for message in sent if isinstance(message, Deltas)]
        assert [d.request_id for step in steps for d in step.requests] == order


def test_a_priority_under_fcfs_is_refused() -> None:
    script = {0: [Add("a", [97], PARAMS, False, 5), Add("b", [98], PARAMS, False)]}
    sent, _ = run(script, scheduling_policy="fcfs")
    refused = [message for message in sent if isinstance(message, Refused)]
    assert [message.request_id for message in refused] == ["a"]
    assert deltas_of(sent, "b")[0].finished


def test_a_salt_keeps_to_itself() -> None:
    prompt = list(range(33))
    adds: dict[int, list[Any]] = {}
    for place, salt in enumerate((None, None, "x", "y", "x", "y")):
        adds[21 * place] = [Add(str(place), prompt, PARAMS, False, cache_salt=salt)]
    search = BeamSearchParams(beam_width=2, max_tokens=20, ignore_eos=True)
    adds[21 * 6] = [Search("6", prompt, search, cache_salt="x")]
    adds[21 * 7] = [Search("7", prompt, search, cache_salt="z")]
    sent, _ = run(adds, runs_ahead=False)
    cached = [deltas_of(sent, str(place))[-1].num_cached_tokens for place in range(8)]
    assert cached == [0, 32, 0, 0, 32, 32, 32, 0]


def test_a_picture_of_the_blocks() -> None:
    prompt = list(range(16))
    sent, _ = run(
        {
            0: [Add("a", prompt, PARAMS, False)],
            1: [Add("b", prompt, PARAMS, False)],
            10: [Ping(with_picture=True)],
            60: [Ping(with_picture=True)],
        },
        runs_ahead=False,
    )
    busy, idle = [message for message in sent if isinstance(message, Pong)]
    assert busy.metrics.num_running == 2
    assert busy.picture.blocks.count(2) == 1  # the prompt's first block serves both
    assert len({byte for byte in busy.picture.blocks if byte >= FIRST_OWNER}) == 2
    assert set(idle.picture.blocks) == {0, CACHED}
    assert len(busy.picture.steps) == 10
    assert idle.step_seconds > busy.step_seconds > 0


def test_messages_survive_the_wire() -> None:
    sent, _ = run({0: [Add("a", [97], SamplingParams(logprobs=None, n=2), True), Ping(True)]})
    for message in sent:
        assert from_engine_decoder.decode(encode([message])[4:]) == message
    search = BeamSearchParams(4, 8, length_penalty=0.5, early_stopping="never", ignore_eos=True)
    for message in (
        Add("a", [97], SamplingParams(n=2, best_of=3), False, -5, "salt"),
        Search("a", [97], search, 7, "salt"),
    ):
        assert to_engine_decoder.decode(encode([message])[4:]) == message


def delta(text: str, finished: bool = False) -> RequestDelta:
    reason = "stop" if finished else None
    completion = CompletionDelta(0, text, [len(text)], None, reason)
    return RequestDelta("a", [completion], finished, RequestMetrics())


async def _read(output: OutputStream) -> list[str]:
    texts = []
    while (deltas := await output.next()) is not None:
        texts.append("".join(c.text for _, d in deltas for c in d.completions))
    return texts


def test_an_output_stream_merges_what_nobody_reads() -> None:
    async def scenario() -> None:
        output = OutputStream(["a"])
        for piece in ("x", "yy", "z"):
            output.put(0, delta(piece))
        assert output.num_pending_tokens == 3
        reading = asyncio.create_task(_read(output))
        await asyncio.sleep(0)
        output.put(0, delta("!", finished=True))
        assert await reading == ["xyyz", "!"]

    asyncio.run(scenario())


def test_parts_with_log_probabilities_sum_up_to_the_delta() -> None:
    def completion(index: int, num_tokens: int) -> CompletionDelta:
        logprobs = [{i: Logprob(-i / 8, i)} for i in range(num_tokens)]
        return CompletionDelta(index, f"text {index}", list(range(num_tokens)), logprobs, "length")

    def delta(*lengths: int) -> RequestDelta:
        completions = [completion(i, length) for i, length in enumerate(lengths)]
        prompt = [None, *({i: Logprob(-i)} for i in range(lengths[-1]))]
        return RequestDelta("a", completions, True, RequestMetrics(1.0), 5, prompt)

    async def scenario(lengths: tuple[int, ...]) -> None:
        parts = list(parts_of(delta(*lengths)))
        assert max(part.size for part in parts) <= TOKENS_PER_MESSAGE
        assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
        output = OutputStream(["b", "a"])
        reading = asyncio.create_task(output.next())
        for part in parts[:-1]:
            output.put(1, part)
            await asyncio.sleep(0)
            assert not reading.done()
        output.put(0, RequestDelta("b", [], True))
        assert await reading == [(0, RequestDelta("b", [], True))]
        output.put(1, parts[-1])
        ((_, total),) = await output.next() or []
        total.completions.sort(key=lambda completion: completion.index)
        assert total == delta(*lengths)
        assert await output.next() is None

    for lengths in (
        (1, 0),
        (0, 3),
        (3 * TOKENS_PER_MESSAGE, 5),
        (5, 3 * TOKENS_PER_MESSAGE),
        (TOKENS_PER_MESSAGE + 1,) * 3,
    ):
        asyncio.run(scenario(lengths))
