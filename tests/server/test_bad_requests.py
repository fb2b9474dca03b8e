"""Bad requests, each with its status, while good ones go on undisturbed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.running_server import MAX_MODEL_LEN, RunningServer, read_all, sse_events

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
USER = {"role": "user", "content": "Hi"}
NOT_NUMBERS: tuple[Any, ...] = ("1", [], {}, True)
NUMBERS: dict[str, tuple[Any, ...]] = {
    "n": (0, -1, 129, 2**31, 2**64, 10**30, 1.5),
    "temperature": (-0.1, 100.5, 1e300, -1e300),
    "top_p": (0, -1, 1.0001, 1e300),
    "top_k": (-2, 2**31, 10**30, 0.5),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-2.1, 2.1, 1e38),
    "frequency_penalty": (-2.1, 2.1, 1e38),
    "repetition_penalty": (0, -1, 101),
    "seed": (2**63, -(2**63) - 1, 10**40, 0.5),
    "max_tokens": (-1, MAX_MODEL_LEN, 2**31, 10**30, 2.5),
    "min_tokens": (-1, 10**10, MAX_MODEL_LEN, 0.5),
    "prompt_logprobs": (-1, 21, 10**10),
}
BAD_FIELDS: dict[str, tuple[Any, ...]] = {
    "stop": ("", [""], ["a"] * 17, [1], "x" * 1025, {"a": 1}),
    "stop_token_ids": ([-1], [300], [10**12], ["a"], [1.5], 5, [True], [1] * 1025),
    "allowed_token_ids": ([], [-1], [300], "a", [10**30]),
    "bad_words": ([""], [1], ["a"] * 129, "a"),
    "logit_bias": (
        {"a": 1},
        {"-1": 1},
        {"300": 1},
        {"99999999999999999999": 1},
        {"1.5": 1},
        {"1": 101},
        {"1": -101},
        {"1": "a"},
        {"²": 1},
        [1],
        {str(i): 0 for i in range(1025)},
    ),
    "stream": ("yes", 1, []),
    "stream_options": ({"include_usage": True}, {"x": 1}, 5, {"include_usage": "yes"}),
    "ignore_eos": (1, "a"),
    "skip_special_tokens": (1, "a"),
    "model": (5, [], {}),
    "user": (5, {}),
    "metadata": ({"a": 1}, [], {"a": {"b": "c"}}),
    "priority": (1, -1, 2**31, -(2**31) - 1, 10**30, 0.5, "a", True),
    "cache_salt": ("", 1, "x" * 1025, ["a"], True),
    "response_format": ({"type": "json_object"}, {"type": "json_schema"}, "text", {}),
    "structured_outputs": ({"json": {}}, {"regex": "a"}),
    "guided_json": ({}, "{}"),
    "guided_regex": ("a+",),
    "guided_choice": (["a"],),
    "guided_grammar": ("root ::= a",),
    "logits_processors": (["a"],),
    "truncate_prompt_tokens": (5,),
    "use_beam_search": (1, "yes", []),
    "length_penalty": (2, 0, -10.1, 10.1, 1e300, "a", True),
    "early_stopping": (True, "never", "always", 1),
    "service_tier": ("flex",),
    "store": (True,),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({"a": 1},),
    "temprature": (1,),
    "__class__": ("a",),
    "": (1,),
}
BAD_WITH_BEAMS: dict[str, tuple[Any, ...]] = {
    "stream": (True,),
    "temperature": (0.7,),
    "top_p": (0.9,),
    "top_k": (1,),
    "min_p": (0.1,),
    "presence_penalty": (1,),
    "frequency_penalty": (1,),
    "repetition_penalty": (1.1,),
    "stop": ("a", ["a"]),
    "include_stop_str_in_output": (True,),
    "min_tokens": (1,),
    "skip_special_tokens": (False,),
    "logit_bias": ({"1": 1},),
    "allowed_token_ids": ([1],),
    "bad_words": (["a"],),
    "prompt_logprobs": (0, 1),
    "length_penalty": (-10.1, 10.1, "a"),
    "early_stopping": ("always", 1),
    "n": (0, 129),
    "max_tokens": (MAX_MODEL_LEN,),
    "stop_token_ids": ([300],),
}
"""Beside use_beam_search."""
BAD_PROMPTS: tuple[Any, ...] = (
    None,
    5,
    1.5,
    True,
    {},
    {"prompt": "a"},
    "",
    [],
    [[]],
    [""],
    ["a", []],
    ["a", 1],
    [1, "a"],
    [-1],
    [300],
    [2**31],
    [10**30],
    [1.5],
    [True],
    [None],
    [[1], [300]],
    [[1], ["a"]],
    [[[1]]],
    "a" * (MAX_MODEL_LEN + 1),
    [1] * MAX_MODEL_LEN,
    "a" * 1_000_000,
    ["a"] * 1025,
)
BAD_MESSAGES: tuple[Any, ...] = (
    None,
    "Hi",
    [],
    {},
    [5],
    [{}],
    [{"role": "user"}],
    [{"content": "Hi"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": ["Hi"]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    [{"role": "king", "content": "Hi"}],
    [{"role": 5, "content": "Hi"}],
    [USER | {"unknown": 1}],
    [USER | {"function_call": {"name": "f"}}],
    [USER | {"audio": {"id": "a"}}],
    [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
    [{"role": "assistant", "tool_calls": [{"id": "a", "type": "custom", "function": {}}]}],
    [USER | {"content": "a" * 5000}],
    [USER] * 1000,
)
BAD_CHAT_FIELDS: dict[str, tuple[Any, ...]] = {
    "tools": ([{"type": "function", "function": {"name": "f"}}], "a", {}),
    "tool_choice": ("auto", "required", {"type": "function"}),
    "functions": ([{"name": "f"}],),
    "function_call": ("auto",),
    "top_logprobs": (1, 21, -1),
    "logprobs": (1, "a"),
    "max_completion_tokens": (-1, MAX_MODEL_LEN, 10**30),
    "modalities": (["audio"], "text"),
    "audio": ({"voice": "a"},),
    "prediction": ({"type": "content"},),
    "web_search_options": ({},),
    "reasoning_effort": ("high",),
    "verbosity": ("low",),
    "chat_template": ("{{ messages }}", "{% for x in range(10**9) %}{% endfor %}"),
    "chat_template_kwargs": (
        {"messages": "a"},
        {"tools": "a"},
        {"chat_template": "a"},
        {"a": {}},
        {"a": [1]},
        "a",
    ),
    "continue_final_message": ("a",),
    "add_generation_prompt": ("a",),
    "documents": ([{"text": "a"}],),
    "echo": (True,),
    "prompt": ("a",),
}


def bodies() -> Iterator[tuple[str, Any]]:
    """Paths and JSON bodies, each of which is answered with 400."""
    for path, good in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})):
        for name, values in NUMBERS.items():
            for value in (*values, *NOT_NUMBERS):
                yield path, good | {name: value}
        for name, values in BAD_FIELDS.items():
            for value in values:
                yield path, good | {name: value}
        for name, values in BAD_WITH_BEAMS.items():
            for value in values:
                yield path, good | {"use_beam_search": True, "n": 20, "max_tokens": 2, name: value}
        for body in ([], "a", 5, None, True, [good], {}):
            yield path, body
    for prompt in BAD_PROMPTS:
        yield COMPLETIONS, {"prompt": prompt}
    for name, values in {
        "logprobs": (-1, 21, True, "a"),
        "best_of": (0, -1, 129, 1.5, True, "a"),
        "suffix": ("a",),
        "echo": (1,),
        "messages": ([USER],),
        "prompt_embeds": ("a",),
    }.items():
        for value in values:
            yield COMPLETIONS, {"prompt": "a", name: value}
    for own in (
        {"n": 3, "best_of": 2},
        {"stream": True, "best_of": 2},
        {"stream": True, "n": 2, "best_of": 3},
        {"use_beam_search": True, "best_of": 2},
        {"use_beam_search": True, "logprobs": 0},
    ):
        yield COMPLETIONS, {"prompt": "a", **own}
    yield CHAT, {"messages": [USER], "use_beam_search": True, "logprobs": True}
    yield CHAT, {"messages": [USER], "best_of": 1}
    yield COMPLETIONS, {"prompt": "a", "stream": True, "prompt_logprobs": 1}
    yield COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1, "prompt_logprobs": 2}
    for messages in BAD_MESSAGES:
        yield CHAT, {"messages": messages}
        if messages not in BAD_MESSAGES[-2:]:  # too long, which can be counted
            yield TOKENIZE, {"messages": messages}
    for name, values in BAD_CHAT_FIELDS.items():
        for value in values:
            yield CHAT, {"messages": [USER], name: value}
    both = {"continue_final_message": True, "add_generation_prompt": True}
    yield CHAT, {"messages": [USER], **both}
    yield CHAT, {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}
    for body in ({}, {"prompt": 5}, {"prompt": "a", "messages": [USER]}, {"prompt": "a", "x": 1}):
        yield TOKENIZE, body
    for tokens in (None, "a", [-1], [300], [10**30], ["a"], [1.5], [True], 5):
        yield DETOKENIZE, {"tokens": tokens}


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()


JSON = {"content-type": "application/json"}
RAW: list[tuple[str, str, dict[str, str], bytes, int]] = [
    *[
        ("POST", COMPLETIONS, JSON, body, 400)
        for body in (
            b"",
            b"{",
            b'{"prompt": "a"',
            b'{"prompt": "a"}}',
            b'{"prompt": "a"} x',
            b"{'prompt': 'a'}",
            b'{"prompt": "\xff"}',
            b'{"prompt": "\xed\xa0\x80"}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "a\x00"}',
            b'{"prompt": "a", "temperature": NaN}',
            b'{"prompt": "a", "temperature": Infinity}',
            b'{"prompt": "a", "temperature": -Infinity}',
            b'{"prompt": "a", "temperature": 1e999}',
            b'{"prompt": "a", "top_p": 1e-999}',
            b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
            b'{"prompt": "a", "temperature": 0x10}',
            b"\xef\xbb\xbf" + b'{"prompt": "a"}',
            b'{"prompt": "a"}'.decode().encode("utf-16"),
            b"[" * 100_000,
            b'{"prompt": ' + b"[" * 50 + b"1" + b"]" * 50 + b"}",
            b'{"metadata": ' + b'{"a":' * 100_000,
            b'{"logits_processors": ' + b"[" * 5000 + b"]" * 5000 + b', "prompt": "a"}',
            b'{"prompt": [' + b"1," * 300_000 + b"1]}",
            b'{"prompt": [' + b"[1]," * 140_000 + b"[1]]}",
            b'{"prompt": "' + b"a" * 9_000_000 + b'"}',
        )
    ],
    ("POST", COMPLETIONS, JSON, b'{"prompt": "' + b"a" * 10_500_000 + b'"}', 413),
    ("POST", COMPLETIONS, {}, as_json({"prompt": "a"}), 415),
    ("POST", COMPLETIONS, {"content-type": "text/plain"}, as_json({"prompt": "a"}), 415),
    ("POST", COMPLETIONS, {"content-type": "multipart/form-data"}, b"a", 415),
    ("POST", COMPLETIONS, {"content-type": "application/x-www-form-urlencoded"}, b"prompt=a", 415),
    ("POST", COMPLETIONS, JSON, as_json({"prompt": "a", "model": "other"}), 404),
    ("POST", COMPLETIONS, JSON, as_json({"prompt": "a", "model": "../../etc/passwd"}), 404),
    ("POST", CHAT, JSON, as_json({"messages": [USER], "model": "x" * 100_000}), 404),
    ("GET", COMPLETIONS, {}, b"", 405),
    ("PUT", COMPLETIONS, JSON, as_json({"prompt": "a"}), 405),
    ("DELETE", "/v1/models", {}, b"", 405),
    ("POST", "/health", {}, b"", 405),
    ("TRACE", "/v1/models", {}, b"", 405),
    ("GET", "/v1/models/none", {}, b"", 404),
    ("GET", "/v1/models/%00", {}, b"", 404),
    *[
        ("GET", path, {}, b"", 404)
        for path in (
            "/v1",
            "/v1/embeddings",
            "/v1/completions/1",
            "/docs",
            "/redoc",
            "/static/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/..%2f..%2fetc%2fpasswd",
            "//v1/models",
            "/V1/models",
            "/v1/models%2f..%2fx",
            "/.env",
            "/\u00e9",
            "/" + "a" * 8000,
        )
    ],
]
SOCKET: list[tuple[bytes, int]] = [
    (b"x\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400),
    (b"GET /\x00 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost a\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n", 413),
    (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-length: 10\r\n\r\n{",
        408,
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        400,
    ),
]
"""What goes over the wire, and the status of the answer."""


@pytest.fixture(scope="module")
def control(server: RunningServer) -> Iterator[None]:
    """Streams that go on while all tests of this file run, and must not notice."""
    body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True, "stream": True}
    bodies = [body | {"seed": seed, "temperature": 1} for seed in range(16)]

    def text(body: dict[str, Any]) -> str:
        events = sse_events(server.post(COMPLETIONS, body))
        return "".join(choice["text"] for event in events for choice in event["choices"])

    with ThreadPoolExecutor(16) as pool:
        quiet = list(pool.map(text, bodies))
        assert len(set(quiet)) == 16
        running = [pool.submit(text, body) for body in bodies]
        yield
        assert [future.result() for future in running] == quiet
    server.wait_until_idle()
    assert server.metric('vllm:num_requests_waiting{engine="0",model_name="tiny"}') == 0


def check_error(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for leak in ("Traceback", "/tmp", "site-packages", "0x7f", "nano_vllm/"):
        assert leak not in response.text


@pytest.mark.usefixtures("control")
def test_bad_bodies(server: RunningServer) -> None:
    corpus = list(bodies())
    assert len(corpus) >= 300
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for path, body in corpus:
            try:
                check_error(client.post(path, content=as_json(body), headers=JSON), 400)
            except AssertionError as error:
                raise AssertionError(f"{path} {json.dumps(body)[:300]}") from error


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(("field", "value"), [(n, v[0]) for n, v in BAD_FIELDS.items() if n])
def test_the_field_is_named(server: RunningServer, field: str, value: Any) -> None:
    error = server.post(COMPLETIONS, {"prompt": "a", field: value}).json()["error"]
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_a_beam_search_cannot_do_is_named(server: RunningServer, path: str) -> None:
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
    for field, values in BAD_WITH_BEAMS.items():
        body = {**prompt, "use_beam_search": True, "max_tokens": 2, field: values[0]}
        error = server.post(path, body).json()["error"]
        if field not in ("stream", "max_tokens"):
            assert error["param"] == field
        assert field in error["message"]


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(("method", "path", "headers", "body", "status"), RAW)
def test_bad_http(
    server: RunningServer, method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    response = server.client.request(
        method, server.url + path, headers=headers, content=body, timeout=30
    )
    check_error(response, status)


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(("data", "status"), SOCKET)
def test_bad_bytes(server: RunningServer, data: bytes, status: int) -> None:
    with server.connect() as client:
        client.sendall(data)
        client.settimeout(5)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer


@pytest.mark.usefixtures("control")
def test_half_closed_connections(server: RunningServer) -> None:
    """They count as left: the first sign of a client that closes looks the same."""
    for body in (None, {"prompt": "a", "max_tokens": 500, "ignore_eos": True}):
        with server.connect(body) as client:
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
    clients = [server.connect() for _ in range(50)]
    for client in clients:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-le")
        client.close()


@pytest.mark.usefixtures("control")
def test_odd_requests_that_are_fine(server: RunningServer) -> None:
    for body in (
        {"prompt": "a", "max_tokens": 1, "tools": None} | {"best_of": 1},
        {"prompt": "\x00\u202e\U0001f600", "max_tokens": 1},
        {"prompt": "a", "max_tokens": 1, "temperature": 1e-45},
        {"prompt": "a", "max_tokens": 1, "top_p": 1e-300, "top_k": 2**31 - 1},
        {"prompt": "a", "max_tokens": 1, "seed": -(2**63), "response_format": {"type": "text"}},
        {"prompt": "a", "max_tokens": 1, "user": "\n\r\x1b[31m"},
        {"prompt": [0], "max_tokens": 1, "logit_bias": {"0": -100, "299": 100.0}},
        {"prompt": "a", "max_tokens": 1, "priority": 0, "cache_salt": "\U0001f600" * 1024},
        {"prompt": "a", "max_tokens": 0, "n": 2, "best_of": 3},
        {"prompt": "a", "max_tokens": 0, "n": 2, "use_beam_search": True, "echo": True},
        {"prompt": "a", "max_tokens": 1, "length_penalty": 1, "early_stopping": False},
        {"prompt": "a", "max_tokens": 1, "use_beam_search": True, "temperature": 0, "top_k": -1},
        {"prompt": "a", "max_tokens": 1, "use_beam_search": True, "stop": [], "best_of": 1},
    ):
        body.pop("tools", None)
        response = server.post(COMPLETIONS, body, headers={"host": "evil.example:99999"})
        assert response.status_code == 200, response.text
    assert server.get("/v1/models?x=%ff", headers={"x-request-id": "mine"}).status_code == 200
