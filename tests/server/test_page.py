"""The page: small, self-contained, whole; and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.chromium import Tab, find_chromium
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


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium")
    tab = Tab(chromium, tmp_path / "profile")
    try:
        yield tab
    finally:
        tab.close()


def by_id(name: str) -> str:
    return f'document.getElementById("{name}")'


def test_a_chat_is_answered_and_the_blocks_move(smollm2: RunningServer, tab: Tab) -> None:
    tab.open(smollm2.url)
    tab.wait_for(f'{by_id("status")}?.textContent === "live"')
    tab.evaluate(f"{by_id('temperature')}.value = 0, {by_id('max_tokens')}.value = 60")
    tab.evaluate(f"{by_id('input')}.focus()")
    maps: list[str] = []
    for question in ("What is the capital of France?", "Why is the sea salty?"):
        tab.type(question + "\n")
        tab.wait_for(f'{by_id("send")}.textContent === "Stop"')
        end = time.monotonic() + 60
        while tab.evaluate(f"{by_id('send')}.textContent") == "Stop":
            assert time.monotonic() < end
            maps.append(tab.evaluate(f"{by_id('blocks')}.toDataURL()"))
            time.sleep(0.1)
    said = tab.evaluate(f"{by_id('messages')}.innerText")
    assert "The capital of France is Paris" in said
    assert re.search(
        r"37 prompt tokens \(\d+ cached\), \d+ output tokens, first after \d+ ms", said
    )
    assert len(set(maps)) > 1
    assert int(tab.evaluate("last.end")) > 0  # of the last step that the page knows
    assert not tab.complaints
    # What is beyond the edge of a canvas, or a line of controls outside of the page, nobody sees.
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(f"{by_id('engine')}.scrollHeight <= {by_id('engine')}.clientHeight")
    assert len(tab.screenshot()) > 10_000
