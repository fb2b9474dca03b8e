"""One server for the tests that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nano_vllm.weights.resolve import resolve_model
from tests.server.running_server import RunningServer, make_tiny_model, running_server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(tiny_model, log, "--log-format", "json", "--read-timeout", "2") as server:
        yield server


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    try:
        resolve_model(None)
    except ValueError as error:
        pytest.skip(str(error))
    log = tmp_path_factory.mktemp("smollm2") / "log"
    server = RunningServer(["--num-blocks", "256", "--max-model-len", "1024"], log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "log"
