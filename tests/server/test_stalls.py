"""The event loop goes on while it takes in and gives out what is large."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.load_client import request_bytes
from tests.server.running_server import RunningServer, running_server

STALL_SECONDS = 0.05
ROUNDS = 8
"""The shortest of their stalls counts: a busy machine makes them longer, never shorter."""
PAUSE_SECONDS = 0.003
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MEGABYTES = "a text " * (10 * 2**20 // 7 - 100)
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "a text of 10 MB": (COMPLETIONS, {"prompt": MEGABYTES}),
    "a conversation of 10 MB": (CHAT, {"messages": [{"role": "user", "content": MEGABYTES}]}),
    "many token ids": (COMPLETIONS, {"prompt": [1] * 2**18}),
    "many prompts": (COMPLETIONS, {"prompt": ["a b"] * 2**17}),
    "128 completions": (COMPLETIONS, {"prompt": "a", "n": 128, "max_tokens": 60}),
    "128 streams": (COMPLETIONS, {"prompt": "a", "n": 128, "max_tokens": 60, "stream": True}),
    "128 streams with log-probabilities": (
        COMPLETIONS,
        {"prompt": "a", "n": 128, "max_tokens": 60, "stream": True, "logprobs": 20},
    ),
    "128 completions with log-probabilities": (
        COMPLETIONS,
        {"prompt": "a", "n": 128, "max_tokens": 100, "logprobs": 20},
    ),
    "128 answers with log-probabilities": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "a"}],
            "n": 128,
            "max_tokens": 100,
            "logprobs": True,
            "top_logprobs": 20,
            "ignore_eos": True,
        },
    ),
    "a prompt with log-probabilities": (
        COMPLETIONS,
        {"prompt": "a" * 2000, "max_tokens": 1, "prompt_logprobs": 20},
    ),
}


@pytest.fixture(scope="module")
def quiet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("stalls") / "log"
    with running_server(tiny_model, log, "--no-access-log", "--num-blocks", "2048") as server:
        yield server


@pytest.mark.parametrize("name", LARGE)
def test_nothing_large_stalls_the_others(quiet: RunningServer, name: str) -> None:
    path, body = LARGE[name]
    data = request_bytes(
        path, {**body, "ignore_eos": True} if "prompt" in body else body, "connection: close"
    )
    stalls = []
    for _ in range(ROUNDS):
        with _Probe(quiet) as probe:
            _send(quiet, data)
        stalls.append(probe.longest)
        if probe.longest <= STALL_SECONDS:
            break
    print(f"{name}: {', '.join(f'{1e3 * stall:.0f}' for stall in stalls)} ms")
    assert min(stalls) <= STALL_SECONDS


class _Probe:
    """Asks for /health again and again on one connection, in a thread of its own."""

    longest = 0.0
    """Seconds until an answer."""

    def __init__(self, server: RunningServer) -> None:
        self._client = server.connect()
        self._has_ended = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> _Probe:
        self._asking = self._thread.submit(self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._asking.result()
        self._client.close()

    def _ask(self) -> None:
        while not self._has_ended.wait(PAUSE_SECONDS):
            start = time.perf_counter()
            self._client.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += self._client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            self.longest = max(self.longest, time.perf_counter() - start)


def _send(server: RunningServer, data: bytes) -> None:
    """Have it answered, whatever the answer is."""
    with server.connect() as client:
        client.settimeout(60)
        client.sendall(data)
        while client.recv(2**20):
            pass
