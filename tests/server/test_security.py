"""The key, the addresses, and what an answer tells."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nano_vllm import serve
from nano_vllm.config import EngineConfig
from nano_vllm.server.app import make_app
from nano_vllm.server.server_config import ServerConfig
from nano_vllm.server.service import Service
from tests.server.running_server import RunningServer, read_all, running_server
from tests.sockets import listening

KEY = "sk-secret-1"


@pytest.fixture(scope="module")
def locked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("locked") / "log"
    env = {"NANO_VLLM_API_KEY": KEY}
    with running_server(tiny_model, log, env=env) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


PATHS = [
    "/",
    "/v1/models",
    "/v1/completions",
    "/metrics",
    "/version",
    "/tokenizer_info",
    "/openapi.json",
    "/debug/state",
    "/tokenize",
    "/none",
    "//health",
    "/health/",
    "/health/../v1/models",
    "/health%2f..%2fv1/models",
    "/v1/models?/health",
    "/v1/models#/health",
    "/Health",
    "/health;x",
]


@pytest.mark.parametrize("path", PATHS)
def test_every_route_but_health_wants_the_key(locked: RunningServer, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer"},
        bearer("x"),
        bearer(KEY + "x"),
        bearer(KEY[:-1]),
        {"authorization": KEY},
        {"authorization": "Basic !!!"},
        {"host": "localhost"},
        {"x-forwarded-for": "127.0.0.1"},
        {"x-original-url": "/health"},
    ):
        for method in ("GET", "POST", "OPTIONS", "HEAD"):
            response = locked.client.request(method, locked.url + path, headers=headers)
            assert response.status_code == 401, (method, headers)
            assert response.headers["www-authenticate"]


@pytest.mark.parametrize("target", ["http://x/health", "/v1/models", "http://health/v1/models"])
@pytest.mark.parametrize("host", ["health", "/health", "", "a b"])
def test_hosts_and_absolute_targets_open_nothing(
    locked: RunningServer, target: str, host: str
) -> None:
    with locked.connect() as client:
        client.sendall(
            f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        )
        answer = read_all(client)
    assert b" 401 " in answer or target == "http://x/health"
    assert b'"max_model_len"' not in answer


def test_the_key_opens(locked: RunningServer) -> None:
    assert locked.get("/health").status_code == 200
    assert locked.get("/v1/models", headers=bearer(KEY)).status_code == 200
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    page = locked.get("/", headers={"authorization": f"Basic {basic}"})
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert locked.get("/").headers["www-authenticate"].startswith("Basic")
    assert KEY not in locked.log


def test_only_this_machine_is_answered_by_default(locked: RunningServer) -> None:
    assert locked.url.startswith("http://127.0.0.1:")
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout
    for address in own.split()[:1]:
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect((address, int(locked.url.rpartition(":")[2])))


def test_nothing_but_the_api_listens(locked: RunningServer) -> None:
    assert len(listening((locked.process.pid, locked.engine_pid))) == 1


def test_a_failure_is_told_as_other_errors_are(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(EngineConfig(), ServerConfig())
    service.metrics = None  # type: ignore[assignment]

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.get("/metrics")

    answer = asyncio.run(ask())
    request_id = answer.headers["x-request-id"]
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": f"internal error; see the server's log for {request_id}",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert f"{request_id} failed" in caplog.text
    assert "AttributeError" in caplog.text


@pytest.mark.parametrize("number", ["-1", "1", "", "x", "\u0661", "\u00b2", "9" * 5000])
def test_no_picture_of_an_engine_that_is_not(locked: RunningServer, number: str) -> None:
    url = f"{locked.url}/debug/state"
    answer = httpx.get(url, params={"engine": number}, headers=bearer(KEY), timeout=10)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("engine must be in [0, 0], got ")


def test_https(tiny_model: Path, log_path: Path, tmp_path: Path) -> None:
    pem, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {pem}"
        ).split(),
        check=True,
        capture_output=True,
    )
    flags = ["--ssl-certfile", str(pem), "--ssl-keyfile", str(key)]
    with running_server(tiny_model, log_path, *flags) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(pem))
        answer = httpx.get(server.url + "/v1/models", verify=context, timeout=10)
        assert answer.json()["data"][0]["id"] == "tiny"
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health", timeout=5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "70000"], "port must be an integer in [0, 65535], got 70000"),
        (["--drain-timeout", "nan"], "drain_timeout must be a finite number above 0"),
        (["--max-queue", "-1"], "max_queue must be an integer of at least 0, got -1"),
        (["--log-format", "xml"], "log_format must be one of text, json, got 'xml'"),
        (["--api-key", ""], "api_key must be printable ASCII, and not empty"),
        (["--ssl-keyfile", "a"], "ssl_keyfile needs ssl_certfile"),
        (["--block-size", "12"], "block_size must be a multiple of 8"),
        (["--max-num-seq", "3"], "did you mean --max-num-seqs?"),
        (["a", "b"], "unknown option 'b'"),
    ],
)
def test_bad_usage_is_one_line(capsys: Any, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ssl-certfile", "/no.pem"], "ssl_certfile '/no.pem', .* No such file"),
        (["--ssl-certfile", __file__], "must be a certificate, its key and others"),
        (["/no/model"], "model '/no/model' does not exist"),
    ],
)
def test_a_start_that_fails_is_one_line(argv: list[str], message: str) -> None:
    argv = [sys.executable, "-m", "nano_vllm.serve", "--cpu", "--port", "0", *argv]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    *said, line = ended.stderr.splitlines()
    assert re.match(f"error: .*{message}", line)
    assert all(text.startswith("listening at ") for text in said)


def test_options_reach_their_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(serve, "_serve", lambda *configs: seen.append(configs) or 0)
    monkeypatch.setenv(serve.KEY_VARIABLE, "k")
    assert serve.main([]) == 0
    assert serve.main(["m", "--cpu", "--block-size", "32", "--port", "1", "--api-key", "x"]) == 0
    (engine, server), (engine2, server2) = seen
    assert (engine.device, server.port, server.api_key) == ("auto", 8000, "k")
    assert (engine2.model, engine2.device, engine2.block_size) == ("m", "cpu", 32)
    assert (server2.port, server2.api_key) == (1, "x")
