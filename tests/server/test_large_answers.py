"""Answers too large to be sent at once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nano_vllm.server.generation import ABORT_CONNECTION, PART_OF_BODY, InParts
from tests.server.running_server import RunningServer


@pytest.mark.parametrize("length", [1, PART_OF_BODY, PART_OF_BODY + 1, 3 * PART_OF_BODY])
def test_all_parts_are_sent(length: int) -> None:
    body = bytes(i % 251 for i in range(length))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        await InParts(body, 5.0)({}, None, send)  # type: ignore[arg-type]

    asyncio.run(scenario())
    start, *parts = sent
    assert (b"content-length", b"%d" % length) in start["headers"]
    assert b"".join(part["body"] for part in parts) == body
    assert max(len(part["body"]) for part in parts) <= PART_OF_BODY
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]


def test_who_does_not_read_is_cut_off() -> None:
    cut_off: list[bool] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def scenario() -> None:
        scope = {"extensions": {ABORT_CONNECTION: lambda: cut_off.append(True)}}
        await InParts(b"a" * 2 * PART_OF_BODY, 0.01)(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(scenario())
    assert cut_off == [True]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_many_log_probabilities_come_whole(server: RunningServer, route: str) -> None:
    fields: dict[str, Any] = {"n": 64, "max_tokens": 60, "seed": 3, "ignore_eos": True}
    if route == "completions":
        fields |= {"prompt": "ab", "logprobs": 20}
    else:
        content = [{"role": "user", "content": "ab"}]
        fields |= {"messages": content, "logprobs": True, "top_logprobs": 20}
    response = server.client.post(f"{server.url}/v1/{route}", json=fields, timeout=60)
    assert len(response.content) > 2 * PART_OF_BODY
    choices = json.loads(response.content)["choices"]
    assert [choice["index"] for choice in choices] == list(range(64))
    for choice in choices:
        logprobs = choice["logprobs"]
        tokens = logprobs["top_logprobs"] if route == "completions" else logprobs["content"]
        assert len(tokens) == 60
