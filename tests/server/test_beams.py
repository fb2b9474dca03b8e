"""Beam search and best_of over the API, against the same engine without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nano_vllm import LLM, BeamSearchParams, RequestOutput, SamplingParams
from tests.server.running_server import NUM_BLOCKS, RunningServer, running_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
RENDERED = "<user>Hi\n<assistant>"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), device="cpu", num_blocks=NUM_BLOCKS) as llm:
        yield llm


def answer(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    response = server.post(path, {"return_token_ids": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


def check_choices(answer: dict[str, Any], expected: list[RequestOutput], n: int) -> None:
    """All completions of all prompts, in their order."""
    outputs = [completion for output in expected for completion in output.outputs]
    assert len(outputs) == n * len(expected)
    for index, (choice, output) in enumerate(zip(answer["choices"], outputs, strict=True)):
        assert choice["index"] == index
        assert choice["token_ids"] == output.token_ids
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert text == output.text
        assert choice["finish_reason"] == output.finish_reason
        assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == sum(len(o.token_ids) for o in outputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.0, "early_stopping": True},
        {"length_penalty": 2.5, "early_stopping": "never"},
        {"length_penalty": -1.0, "ignore_eos": True},
        {"stop_token_ids": list(range(100))},
        {"stop_token_ids": list(range(100)), "early_stopping": True},
        {"stop_token_ids": list(range(100)), "early_stopping": "never"},
    ],
)
def test_beams_are_those_of_the_engine(
    server: RunningServer, llm: LLM, options: dict[str, Any]
) -> None:
    body = {"use_beam_search": True, "n": 4, "max_tokens": 12, **options}
    params = BeamSearchParams(beam_width=4, max_tokens=12, **options)
    texts = ["Once", "The sea"]
    expected = llm.beam_search(texts, params, use_tqdm=False)
    check_choices(answer(server, COMPLETIONS, prompt=texts, temperature=0, **body), expected, 4)
    expected = llm.beam_search([RENDERED], params, use_tqdm=False)
    check_choices(answer(server, CHAT, messages=MESSAGES, **body), expected, 4)


def test_the_options_of_a_search_matter(server: RunningServer) -> None:
    def texts(**options: Any) -> list[list[int]]:
        body = {"prompt": "Once", "n": 4, "max_tokens": 12, "stop_token_ids": list(range(100))}
        choices = answer(server, COMPLETIONS, use_beam_search=True, **body, **options)["choices"]
        return [choice["token_ids"] for choice in choices]

    assert sum(map(len, texts(length_penalty=-10))) < sum(map(len, texts(length_penalty=10)))
    ends = [texts(early_stopping=value) for value in (True, False, "never")]
    assert ends[0] != ends[1] != ends[2] != ends[0]


def test_one_beam_is_greedy(server: RunningServer) -> None:
    body = {"prompt": "abc", "max_tokens": 10}
    (searched,) = answer(server, COMPLETIONS, **body, use_beam_search=True)["choices"]
    (greedy,) = answer(server, COMPLETIONS, **body, temperature=0)["choices"]
    assert searched["token_ids"] == greedy["token_ids"]


def test_a_search_echoes_its_prompt(server: RunningServer) -> None:
    body = {"prompt": "abc", "max_tokens": 5, "n": 2, "use_beam_search": True}
    plain = answer(server, COMPLETIONS, **body)["choices"]
    echoed = answer(server, COMPLETIONS, **body, echo=True)["choices"]
    assert [choice["text"] for choice in echoed] == ["abc" + choice["text"] for choice in plain]


@pytest.mark.parametrize("n", [1, 2])
def test_best_of_returns_the_likeliest(server: RunningServer, llm: LLM, n: int) -> None:
    body = {"n": n, "seed": 3, "max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    expected = llm.generate(["Once"], SamplingParams(**body, best_of=6), use_tqdm=False)
    best = answer(server, COMPLETIONS, prompt="Once", **body, best_of=6)
    check_choices(best, expected, n)
    everything = answer(server, COMPLETIONS, prompt="Once", **(body | {"n": 6}), logprobs=0)
    total = {
        tuple(choice["token_ids"]): sum(choice["logprobs"]["token_logprobs"])
        for choice in everything["choices"]
    }
    ranked = sorted(total, key=lambda token_ids: -total[token_ids])
    assert [tuple(choice["token_ids"]) for choice in best["choices"]] == ranked[:n]
    assert ranked[:n] != list(total)[:n]


def test_best_of_as_many_as_n_is_streamed(server: RunningServer) -> None:
    body = {"prompt": "a", "n": 2, "best_of": 2, "stream": True, "max_tokens": 2}
    assert server.post(COMPLETIONS, body).text.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_ends_its_search(server: RunningServer) -> None:
    body = {"use_beam_search": True, "n": 128, "max_tokens": 2000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(server.url + COMPLETIONS, json={"prompt": "a", **body}, timeout=1)
    server.wait_until_idle(5)
    assert server.metric("nano_vllm:leaked_blocks_total") == 0


def test_more_beams_than_sequences_are_refused(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path, "--max-num-seqs", "3") as server:
        body = {"prompt": "a", "max_tokens": 2, "use_beam_search": True}
        assert len(answer(server, COMPLETIONS, **body, n=3)["choices"]) == 3
        response = server.post(COMPLETIONS, {**body, "n": 4})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "n"
        assert "at most max_num_seqs = 3" in error["message"]
