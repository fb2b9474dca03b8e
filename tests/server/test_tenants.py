"""What requests share and who goes first: turns of a conversation, cache salts, priorities."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.server.running_server import RunningServer, running_server

BLOCK_SIZE = 16
LETTERS = list(range(32, 58))
"""Tokens that come out of text as they went in."""


def chat(server: RunningServer, messages: list[dict[str, str]], **body: Any) -> dict[str, Any]:
    body = {"max_tokens": 60, "allowed_token_ids": LETTERS, "seed": 1, **body}
    response = server.post("/v1/chat/completions", {"messages": messages, **body})
    assert response.status_code == 200, response.text
    return response.json()


def cached_tokens(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def computed_blocks(answer: dict[str, Any]) -> int:
    """Tokens in the full blocks that the answer leaves behind; its last token is never computed."""
    return (answer["usage"]["total_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_turn_begins_where_the_last_one_ended(server: RunningServer) -> None:
    turns = [{"role": "user", "content": "The first turn of a conversation"}]
    for question in ("and another one", "and a third"):
        first = chat(server, turns)
        assert first["usage"]["completion_tokens"] == 60
        turns += [
            {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
            {"role": "user", "content": question},
        ]
        # Another tenant asks the same first, and finds nothing.
        assert cached_tokens(chat(server, turns, cache_salt=f"other of {question}")) == 0
        second = chat(server, turns, max_tokens=1)
        assert computed_blocks(first) > first["usage"]["prompt_tokens"]
        assert cached_tokens(second) == computed_blocks(first)


def test_turns_of_one_salt_share(server: RunningServer) -> None:
    turns = [{"role": "user", "content": "A salted conversation, of several blocks"}]
    first = chat(server, turns, cache_salt="mine")
    turns += [
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "Go on"},
    ]
    for salt, expected in (("mine", computed_blocks(first)), ("mine ", 0), (None, 0)):
        assert cached_tokens(chat(server, turns, cache_salt=salt, max_tokens=1)) == expected


def test_tenants_share_nothing(tiny_model: Path, log_path: Path) -> None:
    prompt = "the same prompt of all tenants " * 5
    body = {"prompt": prompt, "max_tokens": 20, "seed": 1, "ignore_eos": True}
    full = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    searched = {"prompt": prompt, "max_tokens": 3, "use_beam_search": True, "n": 2}
    with running_server(tiny_model, log_path) as server:

        def ask(salt: str | None, body: dict[str, Any] = body) -> tuple[str, int]:
            answer = server.post("/v1/completions", {**body, "cache_salt": salt}).json()
            return answer["choices"][0]["text"], cached_tokens(answer)

        def num_cached_blocks() -> int:
            return look(server)["num_cached_blocks"]

        texts, blocks = set(), [num_cached_blocks()]
        for salt in (None, "a", "b"):
            text, num_cached = ask(salt)
            texts.add(text)
            assert num_cached == 0
            blocks.append(num_cached_blocks())
        assert len(texts) == 1
        each = (len(prompt) + 20 - 1) // BLOCK_SIZE
        assert blocks == [0, each, 2 * each, 3 * each]
        for salt in (None, "a", "b"):
            assert ask(salt) == (text, full)
        assert ask("c", searched)[1] == 0
        assert [ask(salt, searched)[1] for salt in ("a", "c")] == [full, full]
        time.sleep(1.1)  # signs of life come once a second
        labels = '_total{engine="0",model_name="tiny"}'
        assert server.metric("vllm:prefix_cache_queries" + labels) == 9 * len(prompt)
        assert server.metric("vllm:prefix_cache_hits" + labels) == 5 * full
        assert server.metric("nano_vllm:leaked_blocks" + labels) == 0
        assert server.metric("nano_vllm:loaded_tokens" + labels) == 0


def test_the_lowest_priority_goes_first(tiny_model: Path, log_path: Path) -> None:
    flags = ["--scheduling-policy", "priority", "--max-num-seqs", "1"]
    with running_server(tiny_model, log_path, *flags) as server, ThreadPoolExecutor(4) as pool:
        order: list[str] = []

        def ask(path: str, name: str, max_tokens: int, **body: Any) -> None:
            prompt = {"prompt": name} if path == "completions" else {}
            if not prompt:
                prompt = {"messages": [{"role": "user", "content": name}]}
            options = {"max_tokens": max_tokens, "ignore_eos": True, **body}
            response = server.post(f"/v1/{path}", {**prompt, **options})
            assert response.status_code == 200, response.text
            order.append(name)

        # Long enough that the threads here come to their turn in between.
        asked = [
            ("completions", "first", 1500, {"priority": 7}),
            ("completions", "last", 300, {"priority": 7}),
            ("chat/completions", "third", 300, {}),
            ("completions", "second", 300, {"priority": -(2**31)}),
        ]
        tasks = []
        for place, (path, name, max_tokens, body) in enumerate(asked):
            tasks.append(pool.submit(ask, path, name, max_tokens, **body))
            wait_for(lambda place=place: num_requests(server) == (1, place))
        for task in tasks:
            task.result()
        assert order == ["first", "second", "third", "last"]


def test_priorities_need_their_policy(server: RunningServer) -> None:
    for path, body in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        error = server.post(f"/v1/{path}", {**body, "priority": 1}).json()["error"]
        assert error["param"] == "priority"
        assert "--scheduling-policy priority" in error["message"]
        assert server.post(f"/v1/{path}", {**body, "priority": 0}).status_code == 200


def look(server: RunningServer) -> dict[str, Any]:
    """The engine as it is now."""
    with httpx.stream("GET", server.url + "/debug/state", timeout=10) as response:
        line = next(line for line in response.iter_lines() if line)
    return json.loads(line.removeprefix("data: "))


def num_requests(server: RunningServer) -> tuple[int, int]:
    """Running and waiting."""
    metrics = look(server)["metrics"]
    return metrics["num_running"], metrics["num_waiting"]


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
