"""The page: small, self-contained, whole."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.running_server import RunningServer


@pytest.fixture
def page(server: RunningServer) -> str:
    response = server.get("/")
    assert response.status_code == 200
    assert response.headers["content-security-policy"].startswith("default-src 'self'")
    return response.text


def test_it_is_small_and_loads_nothing(page: str) -> None:
    assert len(page.encode()) < 50_000
    assert not re.findall(r"https?://|//cdn|src=|@import|<link", page)


def test_what_the_script_looks_for_is_there(page: str) -> None:
    named = set(re.findall(r"""(?:[$]|surface|drawCurve)\("(\w+)\"""", page))
    assert {"messages", "blocks", "steps", "throughput", "latency", "figures"} <= named
    assert named <= set(re.findall(r'id="(\w+)"', page))


def test_the_script_is_javascript(page: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    path = tmp_path / "page.js"
    path.write_text(script)
    subprocess.run([node, "--check", str(path)], check=True)
