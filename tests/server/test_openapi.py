"""The server's own description of its API, and whether it keeps to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.running_server import RunningServer

EXAMPLES = os.environ.get("NANO_VLLM_TEST_EXAMPLES", "5")
"""Of each operation; the issue's figure is 500."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def test_the_document_names_all_routes(server: RunningServer) -> None:
    document = server.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
        "/version",
        "/tokenizer_info",
        "/health",
        "/metrics",
        "/openapi.json",
    }
    request = document["components"]["schemas"]["CompletionRequest"]
    assert request["additionalProperties"] is False
    assert request["properties"]["temperature"]["anyOf"][0]["maximum"] == 100
    assert request["properties"]["cache_salt"]["anyOf"][0]["minLength"] == 1
    for name in ("CompletionRequest", "ChatRequest"):
        asked = document["components"]["schemas"][name]["properties"]
        assert {"priority", "use_beam_search", "length_penalty", "early_stopping"} <= set(asked)


def test_schemathesis(server: RunningServer, seed: int, tmp_path: Path) -> None:
    """Data that fits the document and data that does not: no 5xx, no status it does not name."""
    command = Path(sys.executable).with_name("schemathesis")
    if not command.exists() and shutil.which("schemathesis") is None:
        pytest.skip("no schemathesis")
    result = subprocess.run(
        [
            str(command if command.exists() else "schemathesis"),
            *("run", f"{server.url}/openapi.json", "--no-color", "--continue-on-failure"),
            *("--checks", ",".join(CHECKS), "--mode", "all"),
            *("--max-examples", EXAMPLES, "--seed", str(seed % 2**31)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert server.get("/health").status_code == 200
