"""Of best_of completions the n likeliest are returned; of n without best_of, all in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nano_vllm.engine.llm import LLM
from nano_vllm.outputs import CompletionOutput, RequestOutput
from nano_vllm.sampling_params import SamplingParams
from tests.engine.fake_runner import FakeRunner, make_engine
from tests.engine.tiny_model import make_llm

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
OTHERS = [[20, 21, 22], [*PROMPT[:8], 3], [30]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with make_llm(tiny_checkpoint) as llm:
        yield llm


def generate(
    llm: LLM, prompts: list[list[int]] | None = None, **params: Any
) -> list[RequestOutput]:
    """Of PROMPT, where no others are given."""
    settings = {"seed": 3, "max_tokens": 6, "ignore_eos": True, **params}
    return llm.generate(prompts or [PROMPT], SamplingParams(**settings), use_tqdm=False)


def tokens(outputs: list[CompletionOutput]) -> list[list[int]]:
    return [completion.token_ids for completion in outputs]


def likeliest(outputs: list[CompletionOutput], n: int) -> list[list[int]]:
    return tokens(sorted(outputs, key=lambda c: -(c.cumulative_logprob or 0.0))[:n])


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_likeliest_come_first_and_are_renumbered(llm: LLM, n: int) -> None:
    (every,) = generate(llm, n=6, logprobs=0)
    (best,) = generate(llm, n=n, best_of=6, logprobs=0)
    expected = likeliest(every.outputs, n) if n < 6 else tokens(every.outputs)
    assert tokens(best.outputs) == expected
    assert [c.index for c in best.outputs] == list(range(n))
    for completion in best.outputs:
        assert completion.logprobs is not None
        entries = zip(completion.token_ids, completion.logprobs, strict=True)
        total = sum(entry[token_id].logprob for token_id, entry in entries)
        assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_only_where_asked_for(llm: LLM) -> None:
    (plain,) = generate(llm, n=2, best_of=5)
    (asked,) = generate(llm, n=2, best_of=5, logprobs=2)
    assert tokens(plain.outputs) == tokens(asked.outputs)
    assert [(c.logprobs, c.cumulative_logprob) for c in plain.outputs] == [(None, None)] * 2
    assert all(c.logprobs and len(c.logprobs[0]) in (2, 3) for c in asked.outputs)


def test_prompt_logprobs_come_once_for_all(llm: LLM) -> None:
    (best,) = generate(llm, n=1, best_of=4, prompt_logprobs=0)
    (alone,) = generate(llm, n=1, prompt_logprobs=0)
    assert best.prompt_logprobs is not None
    assert best.prompt_logprobs[0] is None
    for mine, its in zip(best.prompt_logprobs[1:], (alone.prompt_logprobs or [])[1:], strict=True):
        assert mine is not None
        assert its is not None
        assert {t: e.logprob for t, e in mine.items()} == pytest.approx(
            {t: e.logprob for t, e in its.items()}
        )


@pytest.mark.parametrize("options", [{"num_blocks": 8}, {"max_num_seqs": 2}, {"num_blocks": 256}])
def test_seeds_repeat_whatever_runs_beside(
    llm: LLM, tiny_checkpoint: Path, options: dict[str, Any]
) -> None:
    (alone,) = generate(llm, n=2, best_of=5, max_tokens=30)
    with make_llm(tiny_checkpoint, **options) as other:
        beside = generate(other, [*OTHERS, PROMPT], n=2, best_of=5, max_tokens=30)
        again = generate(other, [PROMPT, *OTHERS], n=2, best_of=5, max_tokens=30)
        assert (other.get_metrics().num_preemptions > 0) == (options == {"num_blocks": 8})
    assert tokens(beside[-1].outputs) == tokens(again[0].outputs) == tokens(alone.outputs)


@pytest.mark.parametrize("best_of", [None, 4])
def test_logprobs_do_not_change_the_order(llm: LLM, best_of: int | None) -> None:
    """Completion i is that of seed + i, also to those who follow it as a stream."""
    (plain,) = generate(llm, n=4, best_of=best_of)
    (asked,) = generate(llm, n=4, best_of=best_of, logprobs=0)
    assert tokens(asked.outputs) == tokens(plain.outputs)
    assert likeliest(asked.outputs, 4) != tokens(asked.outputs), "says nothing"
    params = SamplingParams(n=4, best_of=best_of, seed=3, max_tokens=6, ignore_eos=True, logprobs=0)
    seen: list[list[int]] = [[]] * 4
    for output in llm.stream([llm.make_request(PROMPT, params, stream=True)]):
        for completion in output.outputs:
            before = seen[completion.index]
            assert completion.token_ids[: len(before)] == before
            seen[completion.index] = completion.token_ids
    assert seen == tokens(plain.outputs)


def test_what_was_cut_off_is_none_of_the_likeliest(llm: LLM) -> None:
    """The fewer its tokens, the larger is the sum of their log-probabilities."""
    params = SamplingParams(n=1, best_of=3, seed=3, max_tokens=20, ignore_eos=True)
    request = llm.make_request(PROMPT, params)
    engine = llm.engine
    engine.add(request)
    while len(request.sequences[0].output_token_ids) < 5:
        engine.step()
    engine.scheduler.finish(request.sequences[2], "abort", "not finite")
    assert request.sequences[2].num_output_tokens < 5
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (output,) = outputs
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 20


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 3, "best_of": 2}, "best_of must be at least n = 3, got 2"),
        ({"best_of": 0}, r"best_of must be an integer in \[1, 1024\], got 0"),
        ({"best_of": True}, "best_of must be an integer .*got True"),
    ],
)
def test_best_of_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_what_is_yet_to_be_chosen_cannot_be_streamed() -> None:
    llm = LLM.from_engine(make_engine(FakeRunner()))
    with pytest.raises(ValueError, match=r"best_of = 3 .*n = 1 .*cannot be streamed"):
        llm.make_request([1], SamplingParams(best_of=3), stream=True)
    assert not llm.engine.has_work
