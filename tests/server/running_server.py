"""A server in a process of its own, and a tiny model for it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.engine.fake_runner import EOS, VOCAB_SIZE, make_tokenizer
from tests.models.checkpoints import make_checkpoint
from tests.server.load_client import request_bytes

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_MODEL_LEN = 2048
NUM_BLOCKS = 512
START_SECONDS = 60


def make_tiny_model(folder: Path) -> Path:
    """A random model with a token for each byte."""
    make_checkpoint(
        folder,
        seed=1,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    make_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7}))
    return folder


class RunningServer:
    """A started server process.

    Args:
        args: of the command line.
        log_path: gets what it prints.
        env: environment variables besides the usual.
    """

    def __init__(self, args: list[str], log_path: Path, env: dict[str, str] | None = None) -> None:
        self.log_path = log_path
        self.client = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
        with log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nano_vllm.serve", "--cpu", "--port", "0", *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )
        self.url = self._wait_for(r"listening at (\S+),")

    def _wait_for(self, pattern: str) -> str:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            found = re.search(pattern, self.log)
            if found:
                return found[1]
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in: {self.log}")

    def wait_until_ready(self) -> None:
        self._wait_for("(ready) after")

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def engine_pid(self) -> int:
        """The first child of the server."""
        return self.engine_pids[0]

    @property
    def engine_pids(self) -> list[int]:
        """Its children, by replica and rank."""
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(self.url + path, timeout=10, **options)

    def connect(self, body: Any = None, buffer: int | None = None) -> socket.socket:
        """A plain connection, on which a completion was asked for.

        Args:
            body: of the request; None to send nothing.
            buffer: bytes that the system takes in for the reader.
        """
        host, port = self.url.removeprefix("http://").split(":")
        client = socket.socket()
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.connect((host, int(port)))
        if body is not None:
            client.sendall(request_bytes("/v1/completions", body))
        return client

    def metric(self, name: str) -> float:
        """The value of a metric's first line that begins with the name."""
        return self.metrics(name)[0]

    def metrics(self, name: str, label: str = "") -> list[float]:
        """The values of all lines that begin with the name and have the label, as by replica."""
        lines = self.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(name) and label in line]
        assert found, f"no metric {name}"
        return [float(line.rpartition(" ")[2]) for line in found]

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Until the engines say that they hold no block."""
        end = time.monotonic() + seconds
        time.sleep(1.1)  # signs of life come once a second
        while time.monotonic() < end:
            running = self.metrics("vllm:num_requests_running")
            if not any(running + self.metrics("nano_vllm:kv_blocks", 'state="active"')):
                return
            time.sleep(0.2)
        raise AssertionError("the engine still holds blocks")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def running_server(
    model: Path, log_path: Path, *args: str, env: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """A server of the tiny model, ready."""
    server = RunningServer(
        [str(model), "--served-model-name", "tiny", "--num-blocks", str(NUM_BLOCKS), *args],
        log_path,
        env,
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def read_all(client: socket.socket, seconds: float = 5) -> bytes:
    """What comes until the server closes the connection; TimeoutError if it does not."""
    client.settimeout(seconds)
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def sse_events(response: httpx.Response) -> list[Any]:
    """The decoded events of a stream that was read to its end."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
