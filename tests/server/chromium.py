"""A headless Chromium, driven over its DevTools pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 60
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"


def find_chromium() -> str | None:
    """Its path; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Tab:
    """A browser with one page open. End it with `close`.

    Args:
        path: of the browser.
        profile: an empty folder for what it keeps.
        width, height: of the page in CSS pixels.
    """

    def __init__(self, path: str, profile: Path, width: int = 1280, height: int = 800) -> None:
        to_browser, self._write_fd = os.pipe()
        self._read_fd, from_browser = os.pipe()
        # It wants to read its descriptor 3 and write its descriptor 4.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser} 2>/dev/null'
        command = [path, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=[to_browser, from_browser]
        )
        os.close(to_browser)
        os.close(from_browser)
        self._pending = b""
        self._num_calls = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Exceptions of the page's script, and what the browser logged."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        size = {"width": width, "height": height}
        self._call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def set_dark(self, dark: bool) -> None:
        """Which of the two colour schemes the user prefers."""
        value = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = ANSWER_SECONDS) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"not within {seconds:g} s: {expression}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Into what has the focus; a line break is the Enter key."""
        for number, line in enumerate(text.split("\n")):
            if number > 0:
                key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
                self._call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
                self._call("Input.dispatchKeyEvent", type="keyUp", **key)
            if line:
                self._call("Input.insertText", text=line)

    def screenshot(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write_fd)
        os.close(self._read_fd)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._num_calls += 1
        message: dict[str, Any] = {"id": self._num_calls, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._num_calls:
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            readable, _, _ = select.select([self._read_fd], [], [], ANSWER_SECONDS)
            part = os.read(self._read_fd, 2**20) if readable else b""
            assert part, "the browser does not answer"
            self._pending += part
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)
