"""What the server does when things end that should not, or go on that should end."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from nano_vllm.server.service import read_defaults
from tests.server.running_server import RunningServer, read_all, running_server, sse_events

LONG = {"prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True, "temperature": 0}


class OpenStream:
    """A stream that is read in a thread of its own; returns when its first event is there."""

    def __init__(self, server: RunningServer, **body: Any) -> None:
        self.response: httpx.Response | None = None
        self.lines: list[str] = []
        self.end = 0.0
        self.error: Exception | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server.url, LONG | body))
        self._thread.start()
        assert self._begun.wait(30)

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
                self.response = response
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)
                        self._begun.set()
        except Exception as error:
            self.error = error
        self.end = time.monotonic()
        self._begun.set()

    def wait(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with room for few, and little patience."""
    args = "--max-num-seqs 2 --max-queue 1 --step-timeout 2 --read-timeout 1 --request-timeout 20"
    log = tmp_path_factory.mktemp("small") / "log"
    with running_server(tiny_model, log, *args.split()) as server:
        yield server


def test_engine_killed(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path) as server:
        streams = [OpenStream(server) for _ in range(4)]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "/v1/completions", LONG | {"stream": False})
            time.sleep(0.2)
            killed = time.monotonic()
            os.kill(server.engine_pid, signal.SIGKILL)
            time.sleep(0.2)
            assert server.get("/health").status_code == 503
            for stream in streams:
                stream.wait()
                assert stream.error is None
                assert "the engine process ended" in stream.lines[-2]
                assert stream.lines[-1] == "data: [DONE]"
                assert stream.end - killed < 5
            assert waiting.result().status_code == 503
        assert server.process.wait(10) == 1
        assert "error: the engine process ended" in server.log


def test_sigterm_lets_requests_end(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path) as server:
        stream = OpenStream(server, max_tokens=800)
        engine = server.engine_pid
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        for refused in (server.get("/health"), server.post("/v1/completions", {"prompt": "a"})):
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
        stream.wait()
        assert stream.lines[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in stream.lines[-2]
        assert server.process.wait(10) == 0
        assert not Path(f"/proc/{engine}").exists()


def test_what_does_not_end_in_time_is_aborted(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path, "--drain-timeout", "0.3") as server:
        stream = OpenStream(server, n=8)
        server.process.send_signal(signal.SIGTERM)
        stream.wait()
        assert "the server is shutting down" in stream.lines[-2]
        assert server.process.wait(10) == 0


def test_a_second_signal_stops_at_once(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path) as server:
        stream = OpenStream(server, n=8)
        engine = server.engine_pid
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(2) == 1
        stream.wait()
        time.sleep(0.2)
        assert not Path(f"/proc/{engine}").exists()


def test_a_model_that_cannot_be_loaded(log_path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    server = RunningServer([str(tmp_path)], log_path)
    assert server.process.wait(30) == 1
    errors = [line for line in server.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in server.log


def test_sampling_defaults_that_nobody_could_be_served_with(tmp_path: Path) -> None:
    for name, value in (("temperature", "hot"), ("top_k", 50.0), ("top_p", 0)):
        (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=rf"generation_config\.json: {name} must be .*, got "):
            read_defaults(tmp_path)


def test_a_port_that_is_taken(small: RunningServer, tiny_model: Path, tmp_path: Path) -> None:
    port = small.url.rpartition(":")[2]
    log = tmp_path / "log"
    with pytest.raises(AssertionError, match="address already in use"):
        RunningServer([str(tiny_model), "--port", port], log)
    assert "Traceback" not in log.read_text()


def test_a_frozen_engine(small: RunningServer) -> None:
    pid = small.engine_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 6
        while small.get("/health").status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        refused = small.post("/v1/completions", {"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        time.sleep(1.2)
    finally:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    assert small.get("/health").status_code == 200
    assert "the engine is stuck" in small.log
    assert "engine_process.py" in small.log.rpartition("the engine is stuck")[2]
    assert small.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_a_full_queue_refuses_at_once(small: RunningServer) -> None:
    streams = [OpenStream(small) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(small.post, "/v1/completions", {"prompt": "a", "max_tokens": 1})
        time.sleep(0.2)
        start = time.monotonic()
        refused = small.post("/v1/completions", {"prompt": "a"})
        assert time.monotonic() - start < 0.5
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        for stream in streams:
            stream.wait()
            assert stream.lines[-1] == "data: [DONE]"
        assert third.result().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_ends_a_request(small: RunningServer, stream: bool) -> None:
    with small.connect(LONG | {"stream": stream, "n": 2}) as client:
        time.sleep(0.3)
        assert bool(client.recv(1, socket.MSG_DONTWAIT)) if stream else True
        assert small.get("/metrics").status_code == 200
    small.wait_until_idle(2)


def test_a_reader_that_does_not_read_is_cut_off(small: RunningServer) -> None:
    with small.connect(LONG | {"n": 2, "logprobs": 20}, buffer=4096) as client:
        small.wait_until_idle(30)
        assert b"[DONE]" not in read_all(client)


def test_a_request_that_takes_too_long(tiny_model: Path, log_path: Path) -> None:
    with running_server(tiny_model, log_path, "--request-timeout", "0.5") as server:
        late = server.post("/v1/completions", LONG | {"stream": False, "n": 8})
        assert late.status_code == 504
        *_, last = sse_events(server.post("/v1/completions", LONG | {"n": 8}))
        assert last["error"]["message"] == "the request took more than 0.5 s"
        server.wait_until_idle()


def test_an_idle_engine_uses_no_cpu(small: RunningServer) -> None:
    def ticks() -> int:
        fields = Path(f"/proc/{small.engine_pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    small.wait_until_idle()
    before = ticks()
    time.sleep(3)
    assert ticks() - before <= 3  # of 10 ms each
