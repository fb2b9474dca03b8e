"""The API through plain HTTP, against the same engine without a server."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nano_vllm import LLM, RequestOutput, SamplingParams
from tests.engine.fake_runner import EOS
from tests.server.load_client import request_bytes
from tests.server.running_server import (
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    RunningServer,
    read_all,
    running_server,
    sse_events,
)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), device="cpu", num_blocks=NUM_BLOCKS) as llm:
        yield llm


def offline(llm: LLM, prompt: Any, **options: Any) -> RequestOutput:
    return llm.generate(prompt, SamplingParams(**options), use_tqdm=False)[0]


def complete(server: RunningServer, **body: Any) -> dict[str, Any]:
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(server: RunningServer, **body: Any) -> dict[str, Any]:
    body.setdefault("messages", [{"role": "user", "content": "Hi"}])
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.3, "seed": 5, "top_k": 20},
        {"temperature": 0.9, "seed": -3, "top_p": 0.8, "min_p": 0.01},
        {
            "temperature": 0,
            "repetition_penalty": 1.3,
            "presence_penalty": 1,
            "frequency_penalty": 1,
        },
        {"temperature": 0, "logit_bias": {"65": 50.0}},
        {"temperature": 0, "allowed_token_ids": [65, 66, 67]},
        {"temperature": 0, "min_tokens": 10, "stop_token_ids": [65]},
        {"temperature": 0, "bad_words": ["a"]},
    ],
)
def test_completions_are_those_of_the_engine(
    server: RunningServer, llm: LLM, options: dict[str, Any]
) -> None:
    answer = complete(
        server, model="tiny", prompt="Once", max_tokens=20, return_token_ids=True, **options
    )
    own = dict(options)
    if "logit_bias" in own:
        own["logit_bias"] = {int(i): bias for i, bias in own["logit_bias"].items()}
    expected = offline(llm, "Once", max_tokens=20, **own)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected.outputs[0].token_ids
    assert choice["text"] == expected.outputs[0].text
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids)


def test_the_models_default_temperature_counts(server: RunningServer, llm: LLM) -> None:
    text = complete(server, prompt="abc", max_tokens=20, seed=3)["choices"][0]["text"]
    assert text == offline(llm, "abc", max_tokens=20, seed=3, temperature=0.7).outputs[0].text
    assert text != offline(llm, "abc", max_tokens=20, seed=3, temperature=1.0).outputs[0].text
    assert "generation_config.json: {'temperature': 0.7}" in server.log


def test_prompts_of_every_form(server: RunningServer) -> None:
    def texts(prompt: Any, n: int = 1) -> list[str]:
        answer = complete(server, prompt=prompt, max_tokens=5, seed=1, n=n)
        assert [c["index"] for c in answer["choices"]] == list(range(len(answer["choices"])))
        return [c["text"] for c in answer["choices"]]

    ids = list(b"ab")
    table = server.post("/tokenize", {"prompt": "ab"}).json()["tokens"]
    assert len(table) == len(ids)
    assert texts("ab") == texts(table) == texts(["ab"]) == texts([table])
    assert texts(["ab", "c"]) == texts("ab") + texts("c")
    assert texts(["ab", "c"], n=2) == texts("ab", n=2) + texts("c", n=2)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same(server: RunningServer, n: int) -> None:
    body = {"prompt": ["ab", "c"], "max_tokens": 12, "seed": 1, "n": n, "logprobs": 2, "echo": True}
    whole = complete(server, **body)
    response = server.post(
        "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = sse_events(response)
    assert last["choices"] == []
    assert last["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {
        "prompt_tokens_details": None
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own][-1] == choice["finish_reason"]
        assert all(c["finish_reason"] is None for c in own[:-1])
        for name, values in choice["logprobs"].items():
            assert [v for c in own for v in c["logprobs"][name]] == values


def test_a_chat_stream_says_the_same(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "seed": 4}
    body |= {"logprobs": True, "top_logprobs": 2, "n": 2}
    whole = chat(server, **body)
    chunks = sse_events(server.post("/v1/chat/completions", {**body, "stream": True}))
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == choice["message"]["content"]
        entries = [e for c in own if c["logprobs"] for e in c["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
    assert all("usage" not in chunk for chunk in chunks)


def test_chat_renders_the_models_template(server: RunningServer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
    ]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "<system>Be brief.\n<user>Hi\n<assistant>"
    answer = chat(server, messages=messages, max_tokens=3, return_token_ids=True)
    assert answer["prompt_token_ids"] == tokens


def test_a_final_message_is_continued(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    tokens = server.post("/tokenize", body).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "<user>Hi\n<assistant>Well, "


def test_messages_make_no_special_tokens(server: RunningServer) -> None:
    user = {"role": "user", "content": "<eos>", "name": "<eos>"}
    for options in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        body = {"messages": [user], "chat_template_kwargs": {"a": "<eos>"}, **options}
        text = "<user><eos>" if options else "<user><eos>\n<assistant>"
        assert server.post("/tokenize", body).json()["tokens"] == list(text.encode())
    answer = chat(server, messages=[user], max_tokens=1, return_token_ids=True)
    assert EOS not in answer["prompt_token_ids"]
    # A plain prompt has no other way to say it.
    assert server.post("/tokenize", {"prompt": "a<eos>"}).json()["tokens"] == [97, EOS]


def test_chat_fills_the_context_by_default(server: RunningServer) -> None:
    answer = chat(server, messages=[{"role": "user", "content": "x" * 2000}], ignore_eos=True)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_strings(server: RunningServer) -> None:
    body = {"prompt": "Q", "max_tokens": 30, "seed": 1, "allowed_token_ids": list(range(65, 91))}
    text = complete(server, **body)["choices"][0]["text"]
    stop = text[5:7]
    choice = complete(server, **body, stop=["?", stop])["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_echo_and_logprobs_of_the_prompt(server: RunningServer, llm: LLM) -> None:
    expected = offline(llm, "abcd", max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=1)
    values = [
        None if entry is None else entry[token].logprob
        for token, entry in zip(
            expected.prompt_token_ids, expected.prompt_logprobs or [], strict=True
        )
    ]
    for max_tokens in (0, 1):
        answer = complete(
            server, prompt="abcd", max_tokens=max_tokens, temperature=0, logprobs=1, echo=True
        )
        choice = answer["choices"][0]
        assert choice["logprobs"]["token_logprobs"][:4] == values
        assert choice["logprobs"]["text_offset"][:4] == [0, 1, 2, 3]
        assert len(choice["logprobs"]["tokens"]) == 4 + max_tokens
        assert choice["text"] == "abcd" + expected.outputs[0].text * max_tokens
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("echo", "text"), [(False, ""), (True, "ab")])
def test_no_tokens_at_all(server: RunningServer, echo: bool, text: str, stream: bool) -> None:
    body = {"prompt": "ab", "max_tokens": 0, "echo": echo}
    if stream:
        (answer,) = sse_events(server.post("/v1/completions", {**body, "stream": True}))
    else:
        answer = complete(server, **body)
        assert answer["usage"]["completion_tokens"] == 0
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")


def test_prompt_logprobs(server: RunningServer) -> None:
    choice = complete(server, prompt="abc", max_tokens=1, prompt_logprobs=2)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 3
    entry = next(iter(choice["prompt_logprobs"][1].values()))
    assert set(entry) == {"logprob", "rank", "decoded_token"}


def test_cached_tokens_and_timings(server: RunningServer) -> None:
    prompt = "a prompt of several blocks " * 4
    complete(server, prompt=prompt, max_tokens=1)
    answer = complete(server, prompt=prompt, max_tokens=4, timings=True)
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == (len(prompt) - 1) // 16 * 16
    assert set(answer["timings"]) == {
        "queue_ms",
        "prefill_ms",
        "decode_ms",
        "stalled_ms",
        "num_preemptions",
    }
    assert "timings" not in complete(server, prompt=prompt, max_tokens=1)


def test_token_ids_alone(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path, "--skip-tokenizer-init") as server:
        body = {"prompt": [1, 2], "max_tokens": 3, "return_token_ids": True, "ignore_eos": True}
        (choice,) = complete(server, **body, logprobs=0)["choices"]
        assert (choice["text"], len(choice["token_ids"])) == ("", 3)
        assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
        events = sse_events(server.post("/v1/completions", {**body, "stream": True}))
        assert sum(len(event["choices"][0]["token_ids"]) for event in events) == 3
        for path, refused, field in (
            ("/v1/completions", {"prompt": "a"}, "prompt"),
            ("/v1/completions", {"prompt": [1], "echo": True}, "prompt"),
            ("/v1/completions", {"prompt": [1], "stop": "a"}, "stop"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
            ("/detokenize", {"tokens": [1]}, "tokens"),
        ):
            response = server.post(path, refused)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == field


def test_models(server: RunningServer) -> None:
    cards = server.get("/v1/models").json()["data"]
    assert [(c["id"], c["max_model_len"]) for c in cards] == [("tiny", MAX_MODEL_LEN)]
    assert server.get("/v1/models/tiny").json()["id"] == "tiny"
    assert server.get("/v1/models/other").status_code == 404


def test_tokens_there_and_back(server: RunningServer) -> None:
    text = "Größe, 日本, <eos>"
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["tokens"][-1] == EOS
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_health_version_and_metrics(server: RunningServer) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/version").json()["version"]
    complete(server, prompt="a", max_tokens=2)
    text = server.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_hits_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:request_success_total",
        'nano_vllm:kv_blocks{engine="0",model_name="tiny",state="cached"}',
    ):
        assert name in text, name


def test_the_access_log_is_json(server: RunningServer) -> None:
    request_id = server.get("/v1/models").headers["x-request-id"]
    time.sleep(0.1)  # the line comes behind the response
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    (entry,) = [line for line in lines if line["request_id"] == request_id]
    assert (entry["method"], entry["path"], entry["status"]) == ("GET", "/v1/models", 200)


def test_the_feed_shows_the_engine(server: RunningServer) -> None:
    with httpx.stream("GET", server.url + "/debug/state", timeout=10) as response:
        line = next(line for line in response.iter_lines() if line)
    state = json.loads(line.removeprefix("data: "))
    assert state["metrics"]["num_blocks"] == NUM_BLOCKS
    assert {"blocks", "steps", "num_cached_blocks"} <= set(state)


def test_streams_that_were_asked_for_together_come_one_behind_the_other(
    server: RunningServer,
) -> None:
    bodies = [
        {"prompt": prompt, "max_tokens": 40, "seed": 3, "stream": True, "ignore_eos": True}
        for prompt in ("a", "bc")
    ]
    alone = [server.post("/v1/completions", body).text for body in bodies]
    first, last = bodies
    with server.connect() as client:
        client.sendall(
            request_bytes("/v1/completions", first)
            + request_bytes("/v1/completions", last, "connection: close")
        )
        answers = read_all(client, 20).split(b"HTTP/1.1 200 OK")[1:]
    assert len(answers) == 2
    for answer, expected in zip(answers, alone, strict=True):
        _, _, body = answer.partition(b"\r\n\r\n")
        text = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", body).decode()
        texts = [
            "".join(json.loads(part)["choices"][0]["text"] for part in re.findall(r"{.*}", stream))
            for stream in (text, expected)
        ]
        assert texts[0] == texts[1]
