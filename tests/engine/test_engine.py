"""From requests to results, with a runner that needs no model."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from nano_vllm.engine.engine import Engine
from nano_vllm.outputs import RequestOutput
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.tokenizer.tokenizer import Tokenizer
from tests.engine.fake_runner import (
    EOS,
    VOCAB_SIZE,
    FakeRunner,
    check_invariants,
    make_engine,
    make_tokenizer,
    reference_tokens,
)

TOKENIZER = make_tokenizer("Hello", " world", "END", "D!")


def run(engine: Engine) -> dict[str, RequestOutput]:
    finished = {}
    while engine.has_work:
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        check_invariants(engine)
    return finished


def complete(text: str, end: list[int] | None = None, **params: Any) -> list[RequestOutput]:
    """All results of a request, step by step, whose output is this text's tokens."""
    script = [*TOKENIZER.encode(text), *([EOS] if end is None else end)]
    engine = make_engine(FakeRunner(script={("r", 0): script}), TOKENIZER)
    settings = SamplingParams(**{"max_tokens": len(script), **params})
    engine.add_request("r", [65], settings, stream=True)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def ending(text: str, end: list[int] | None = None, **params: Any) -> tuple[Any, ...]:
    completion = complete(text, end, **params)[-1].outputs[0]
    return completion.text, completion.finish_reason, completion.stop_reason


def test_eos_ends_the_text_and_stays_among_the_tokens() -> None:
    completion = complete("Hi")[-1].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        "Hi",
        "stop",
        None,
    )
    assert completion.token_ids == [*TOKENIZER.encode("Hi"), EOS]


def test_ignored_eos_is_a_token_like_others() -> None:
    assert ending("Hi", [EOS, 65], ignore_eos=True) == ("HiA", "length", None)
    assert ending("Hi", [EOS, 65], ignore_eos=True, skip_special_tokens=False) == (
        "Hi<eos>A",
        "length",
        None,
    )


def test_stop_token() -> None:
    stop = TOKENIZER.token_to_id("END")
    assert ending("Hi", [stop], stop_token_ids=[stop]) == ("Hi", "stop", stop)
    assert ending("Hi", [stop], stop_token_ids=[stop], include_stop_str_in_output=True) == (
        "HiEND",
        "stop",
        stop,
    )


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcENDxyz", "END", ("abc", "stop", "END")),
        ("Hello world!", "lo wor", ("Hel", "stop", "lo wor")),
        ("abENcENDD!", ["ENDD!"], ("abENc", "stop", "ENDD!")),
        ("abEN", "END", ("abEN", "length", None)),
    ],
)
def test_stop_strings_across_tokens(text: str, stop: Any, expected: tuple[Any, ...]) -> None:
    num_tokens = len(TOKENIZER.encode(text))
    assert ending(text, stop=stop, max_tokens=num_tokens) == expected


def test_stop_string_kept() -> None:
    assert ending("Hello world!", stop="lo w", include_stop_str_in_output=True) == (
        "Hello w",
        "stop",
        "lo w",
    )


def test_a_stop_string_frees_the_blocks_at_once() -> None:
    script = TOKENIZER.encode("a.b")
    engine = make_engine(FakeRunner(script={("r", 0): script}), TOKENIZER)
    engine.add_request("r", [65], SamplingParams(stop=".", max_tokens=9))
    assert engine.step() == []
    assert engine.step()[0].outputs[0].text == "a"
    assert not engine.has_work
    assert engine.get_metrics().num_free_blocks == 64


def test_stop_string_in_the_last_token_counts_before_length() -> None:
    assert ending("ab", [], stop="b", max_tokens=2) == ("a", "stop", "b")


def test_min_tokens_hold_for_stop_strings() -> None:
    assert ending("a.b.c.d", stop=".", min_tokens=3) == ("a.b", "stop", ".")
    assert ending("a.b.c.d", stop=".", min_tokens=4) == ("a.b.c", "stop", ".")


def test_streamed_text_only_grows_and_holds_back_what_may_be_a_stop_string() -> None:
    outputs = complete("abENcENDx", stop="END")
    texts = [output.outputs[0].text for output in outputs]
    assert texts == ["a", "ab", "ab", "ab", "abENc", "abENc"]
    assert [output.finished for output in outputs] == [False] * 5 + [True]


def test_streamed_text_never_splits_a_character() -> None:
    texts = [output.outputs[0].text for output in complete("a€")]
    assert texts == ["a", "a", "a", "a€", "a€"]


def test_half_a_character_at_the_end() -> None:
    half = TOKENIZER.encode("€")[:2]
    assert ending("a", half, max_tokens=3)[0] == "a\N{REPLACEMENT CHARACTER}"


def sentencepiece_tokenizer() -> Tokenizer:
    """Decodes as Llama 2's: the space before the first piece of a text is not part of it."""
    pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hi", "▁", "!"]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("prompt", "expected"), [("<s>", "Hi Hi! "), ("<s> ▁Hi", " Hi Hi! "), ("▁Hi", " Hi Hi! ")]
)
def test_a_space_at_the_start_is_kept_behind_a_prompt(prompt: str, expected: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    prompt_ids, script = (
        [tokenizer.token_to_id(piece) for piece in pieces.split()]
        for pieces in (prompt, "▁Hi ▁Hi ! ▁")
    )
    engine = make_engine(FakeRunner(script={("r", 0): script}), tokenizer)
    engine.add_request("r", prompt_ids, SamplingParams(max_tokens=len(script)))
    assert run(engine)["r"].outputs[0].text == expected


def test_without_detokenize_there_is_no_text() -> None:
    assert ending("Hi", detokenize=False) == ("", "stop", None)


def test_completions_of_a_request_are_those_of_seeds_counted_up() -> None:
    prompt = list(range(40))
    params = SamplingParams(n=3, seed=5, max_tokens=20)
    engine = make_engine(FakeRunner())
    engine.add_request("r", prompt, params)
    for single in range(3):
        engine.add_request(f"s{single}", prompt, SamplingParams(seed=5 + single, max_tokens=20))
    outputs = run(engine)
    assert [c.index for c in outputs["r"].outputs] == [0, 1, 2]
    for index, completion in enumerate(outputs["r"].outputs):
        assert completion.token_ids == outputs[f"s{index}"].outputs[0].token_ids
        assert completion.token_ids == reference_tokens(prompt, params, index, 128)


def test_a_request_of_several_completions_is_reported_once() -> None:
    engine = make_engine(FakeRunner())
    engine.add_request("r", [1], SamplingParams(n=4, seed=0, max_tokens=30))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert len(outputs) == 1
    assert outputs[0].finished


def test_a_failing_request_harms_only_itself() -> None:
    prompt = list(range(20))
    params = SamplingParams(seed=1, max_tokens=10)
    engine = make_engine(FakeRunner(failing={"bad"}))
    for name in ("a", "bad", "b"):
        engine.add_request(name, prompt, params)
    outputs = run(engine)
    bad = outputs["bad"].outputs[0]
    assert (bad.finish_reason, bad.stop_reason, bad.token_ids) == ("abort", "not finite", [])
    for name in "ab":
        assert outputs[name].outputs[0].token_ids == reference_tokens(prompt, params, 0, 128)
    assert engine.get_metrics().num_aborted_requests == 1


def test_prefix_hits_are_reported() -> None:
    engine = make_engine(FakeRunner())
    params = SamplingParams(seed=1, max_tokens=1)
    hits = []
    for length in (32, 32, 33, 100):
        engine.add_request("r", list(range(length)), params)
        hits.append(run(engine)["r"].num_cached_tokens)
    # Full blocks of 8, and never the whole prompt
    assert hits == [0, 24, 32, 32]


def test_abort() -> None:
    engine = make_engine(FakeRunner())
    engine.add_request("a", [1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
    engine.add_request("b", [3, 4], SamplingParams(max_tokens=5, seed=0))
    engine.step()
    engine.step()
    output = engine.abort("a")
    assert output is not None
    assert output.finished
    assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("abort", 2)
    assert engine.abort("a") is None
    assert set(run(engine)) == {"b"}


def test_times() -> None:
    engine = make_engine(FakeRunner(max_num_batched_tokens=8))
    engine.add_request("a", [1] * 20, SamplingParams(max_tokens=3, ignore_eos=True))
    metrics = run(engine)["a"].metrics
    assert metrics.arrival_time == 0
    assert metrics.first_scheduled_time == 1
    # Two readings a step, three steps for the prompt, and one to launch the step behind it.
    assert metrics.first_token_time == 7
    assert metrics.finished_time == 10


def test_metrics() -> None:
    engine = make_engine(FakeRunner(), max_num_seqs=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for name in "ab":
        engine.add_request(name, [1] * 20, params)
    engine.step()
    metrics = engine.get_metrics()
    assert (metrics.num_running, metrics.num_waiting, metrics.num_free_blocks) == (1, 1, 61)
    run(engine)
    metrics = engine.get_metrics()
    assert (metrics.num_finished_requests, metrics.num_steps) == (2, 6)
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (40, 6)
    assert metrics.num_cached_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "at least one token, got none"),
        ([1, VOCAB_SIZE], {}, r"integers in \[0, 300\), got 300 at position 1"),
        ([-1], {}, "got -1 at position 0"),
        ([1, "2"], {}, "got '2' at position 1"),
        ([True], {}, "got True at position 0"),
        ([1.0], {}, "got 1.0 at position 0"),
        ([1] * 128, {}, "at most 127 tokens.*max_model_len = 128, got 128"),
        ([1], {"stop_token_ids": [300]}, r"stop_token_ids must lie in \[0, 300\), got 300"),
        ([1], {"allowed_token_ids": [5, 999]}, "allowed_token_ids .* got 999"),
        ([1], {"logit_bias": {301: 1.0}}, "logit_bias .* got 301"),
        ([1], {"logprobs": 301}, "logprobs must be at most the vocabulary's 300 tokens, got 301"),
        ([1], {"prompt_logprobs": 400}, "prompt_logprobs .* got 400"),
        ([1], {"stop": "x"}, "stop needs a tokenizer"),
        ([1], {"bad_words": ["x"]}, "bad_words needs a tokenizer"),
    ],
)
def test_the_gate(prompt: list[int], params: dict[str, Any], message: str) -> None:
    engine = make_engine(FakeRunner())
    with pytest.raises(ValueError, match=message):
        engine.add_request("r", prompt, SamplingParams(**params))
    assert not engine.has_work
    engine.add_request("r", [1], SamplingParams())


def test_params_of_another_kind_are_refused() -> None:
    engine = make_engine(FakeRunner())
    with pytest.raises(ValueError, match=r"must be a SamplingParams, got \{'n': 1\}"):
        engine.add_request("r", [1], {"n": 1})  # type: ignore[arg-type]


def test_a_request_id_is_unique() -> None:
    engine = make_engine(FakeRunner())
    engine.add_request("r", [1], SamplingParams())
    with pytest.raises(ValueError, match="request_id 'r' is in use"):
        engine.add_request("r", [1], SamplingParams())


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"15 blocks of 8 = 120 tokens .* max_model_len = 128: lower max_model_len"
    ):
        make_engine(FakeRunner(num_blocks=15))


def test_bad_words_are_tokenised_with_and_without_a_space() -> None:
    engine = make_engine(FakeRunner(), TOKENIZER)
    request = engine.make_request("r", [1], SamplingParams(bad_words=["world", "Hello"]))
    assert set(request.sequences[0].bad_words) == {
        tuple(TOKENIZER.encode(text)) for text in ("world", " world", "Hello", " Hello")
    }


def test_only_the_first_completion_reports_prompt_logprobs() -> None:
    engine = make_engine(FakeRunner())
    request = engine.make_request("r", [1], SamplingParams(n=2, prompt_logprobs=1))
    assert [s.params.prompt_logprobs for s in request.sequences] == [1, None]


def test_close_frees_everything_once() -> None:
    runner = FakeRunner()
    engine = make_engine(runner)
    engine.add_request("r", [1], SamplingParams())
    engine.step()
    engine.close()
    engine.close()
    assert runner.is_closed
    assert not engine.has_work
    with pytest.raises(RuntimeError, match="closed"):
        engine.add_request("r", [1], SamplingParams())


@pytest.mark.parametrize(("prompt_len", "output_len"), [(15, 18), (1, 32), (24, 9), (8, 9)])
def test_every_block_of_the_pool_serves(prompt_len: int, output_len: int) -> None:
    """As many sequences as there are blocks for run to their ends together: none is kept back, and
    none is padding. The last token is never in the cache.
    """
    runner = FakeRunner(max_model_len=64)
    engine = make_engine(runner, max_num_seqs=256, enable_prefix_caching=False)
    num_blocks = engine.get_metrics().num_blocks
    count = num_blocks // -(-(prompt_len + output_len - 1) // runner.block_size)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, detokenize=False)
    for index in range(count):
        engine.add_request(str(index), [index] * prompt_len, params)
    most_running, least_free = 0, num_blocks
    while engine.has_work:
        engine.step()
        metrics = engine.get_metrics()
        most_running = max(most_running, metrics.num_running)
        least_free = min(least_free, metrics.num_free_blocks)
    assert (most_running, least_free) == (count, 0)
    assert engine.get_metrics().num_preemptions == 0
