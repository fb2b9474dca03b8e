"""Prompts find the cached blocks of equal salts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nano_vllm.engine.llm import LLM
from nano_vllm.engine.prompts import Prompt
from nano_vllm.sampling_params import BeamSearchParams, SamplingParams
from tests.engine.fake_runner import FakeRunner, make_engine, make_tokenizer, reference_tokens
from tests.engine.tiny_model import make_llm as make_tiny_llm

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMS = SamplingParams(seed=1, max_tokens=3, ignore_eos=True)
TOKENS = list(range(41))
SALTS = (None, "a", "b", "A", "a ", "ab", "\N{SNOWMAN}", "x" * 1024)


def make_llm(num_host_blocks: int = 0, num_blocks: int = 64) -> LLM:
    runner = FakeRunner(num_blocks, num_host_blocks=num_host_blocks, max_num_batched_tokens=512)
    return LLM.from_engine(make_engine(runner, make_tokenizer()))


def salted(salt: str | None, token_ids: list[int] = TOKENS) -> dict[str, Any]:
    return {"prompt_token_ids": token_ids} | ({} if salt is None else {"cache_salt": salt})


def hits(llm: LLM, *prompts: Prompt) -> list[int]:
    outputs = llm.generate(list(prompts), PARAMS, use_tqdm=False)
    for output in outputs:
        assert output.outputs[0].token_ids == reference_tokens(
            output.prompt_token_ids, PARAMS, 0, 128
        )
    return [output.num_cached_tokens for output in outputs]


def test_no_hits_across_salts() -> None:
    llm = make_llm()
    for salt in SALTS:
        assert hits(llm, salted(salt)) == [0], salt
    for salt in SALTS:
        assert hits(llm, salted(salt)) == [40], salt
    assert hits(llm, salted("c")) == [0]


def test_no_hits_across_salts_in_one_step() -> None:
    prompts = [salted(salt) for salt in SALTS] * 2
    assert hits(make_llm(), *prompts) == [0] * len(SALTS) + [40] * len(SALTS)


def test_no_hits_across_salts_in_host_memory() -> None:
    llm = make_llm(num_host_blocks=1000, num_blocks=16)
    assert hits(llm, salted("a")) == [0]
    hits(llm, *([place] * 100 for place in range(9)))
    assert hits(llm, salted("b"), salted(None)) == [0, 0]
    hits(llm, *([place] * 100 for place in range(9, 18)))
    loaded = llm.get_metrics().num_loaded_tokens
    assert hits(llm, salted("a")) == [40]
    assert llm.get_metrics().num_loaded_tokens - loaded == 40


def test_every_form_of_prompt_takes_a_salt() -> None:
    llm = make_llm()
    text = "a" * 41
    assert hits(llm, {"prompt": text, "cache_salt": "a"}, text) == [0, 0]
    assert hits(llm, {"prompt": text, "cache_salt": "a"}) == [40]
    assert hits(llm, salted("a", [97] * 41)) == [40]
    assert hits(llm, {"prompt": text, "cache_salt": None}) == [40]


def test_completions_and_beams_of_a_salted_prompt_stay_in_it(tiny_checkpoint: Path) -> None:
    with make_tiny_llm(tiny_checkpoint) as llm:
        params = SamplingParams(n=2, seed=1, max_tokens=22, ignore_eos=True)
        (output,) = llm.generate(salted("a", [1, 2, 3]), params, use_tqdm=False)
        search = BeamSearchParams(beam_width=2, max_tokens=3)
        (found,) = llm.beam_search(salted("b"), search, use_tqdm=False)
        assert found.num_cached_tokens == 0
        (found,) = llm.beam_search(salted("b"), search, use_tqdm=False)
        assert found.num_cached_tokens == 40
        one = SamplingParams(max_tokens=1)
        for completion in output.outputs:
            for salt, count in {None: 0, "b": 0, "a": 24}.items():
                prompt = salted(salt, [1, 2, 3, *completion.token_ids])
                (again,) = llm.generate(prompt, one, use_tqdm=False)
                assert again.num_cached_tokens == count


def test_what_is_scored_stays_in_its_salt(tiny_checkpoint: Path) -> None:
    with make_tiny_llm(tiny_checkpoint) as llm:
        llm.score([salted("a")], [[5, 6, 7]], use_tqdm=False)
        one = SamplingParams(max_tokens=1)
        for salt, count in ((None, 0), ("a", 40)):
            (output,) = llm.generate(salted(salt), one, use_tqdm=False)
            assert output.num_cached_tokens == count
        with pytest.raises(ValueError, match="pair 0: cache_salt must be a string"):
            llm.score([salted("")], [[5]], use_tqdm=False)


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5, True, b"a", ["a"], "\ud800"])
def test_bad_salts_are_one_clear_line(salt: Any) -> None:
    llm = make_llm()
    calls: list[Any] = [
        lambda prompt: llm.generate([[1], prompt], PARAMS, use_tqdm=False),
        lambda prompt: llm.beam_search(
            [[1], prompt], BeamSearchParams(beam_width=2, max_tokens=2), use_tqdm=False
        ),
        lambda prompt: llm.session(prompt),
    ]
    for prompt in (
        {"prompt_token_ids": [1], "cache_salt": salt},
        {"prompt": "a", "cache_salt": salt},
    ):
        for call in calls:
            with pytest.raises(ValueError, match="cache_salt must be a string") as error:
                call(prompt)
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 250
    assert not llm.engine.has_work
    assert hits(llm, salted("a")) == [0]


@pytest.mark.parametrize("prompt", [{"cache_salt": "a"}, {"prompt": "a", "salt": "b"}])
def test_a_salt_alone_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt 0: a prompt must be"):
        make_llm().generate(prompt, PARAMS, use_tqdm=False)
