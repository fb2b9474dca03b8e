"""What stands before the routes: the key, ids of requests, the access log, and a net for errors."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nano_vllm.server.errors import ApiError
from nano_vllm.server.generation import WRITE_PART, Send, error_response
from nano_vllm.server.http_body import Disconnected, Receive

OPEN_PATH = "/health"
"""The one route that needs no key."""
PAGE_PATH = "/"
"""For people: their browser asks for the key."""
REQUEST_ID = "nano_vllm.request_id"
"""Of the scope."""
ACCESS_LOG = logging.getLogger("nano_vllm.access")
ERROR_LOG = logging.getLogger("nano_vllm.error")
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI app around the routes.

    Args:
        app: the routes.
        api_key: what clients must show; None for nothing.
        log_format: of the access log: text, json, or None for no log.
    """

    def __init__(self, app: App, api_key: str | None, log_format: str | None) -> None:
        self._app = app
        self._digest = None if api_key is None else _digest(api_key.encode())
        self._log_format = log_format

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = "req-" + secrets.token_hex(12)
        scope[REQUEST_ID] = request_id
        status, num_bytes = 0, 0

        async def send_on(message: MutableMapping[str, Any]) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            else:
                num_bytes += len(message.get("body", b""))
            await send(message)

        write_part = scope.get("extensions", {}).get(WRITE_PART)
        if write_part is not None:

            def write_part_on(body: bytes) -> bool:
                nonlocal num_bytes
                could = write_part(body)
                num_bytes += len(body) if could else 0
                return could

            scope["extensions"][WRITE_PART] = write_part_on

        try:
            if scope["path"] != OPEN_PATH and not self._has_key(scope):
                error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
                response = error_response(error)
                if scope["path"] == PAGE_PATH:
                    response.headers["www-authenticate"] = 'Basic realm="nano_vllm"'
                await response(scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except Disconnected:
            pass
        except Exception:  # behind an answer that says so
            ERROR_LOG.exception("%s failed", request_id)
        finally:
            self._log(scope, request_id, status or 499, num_bytes, time.perf_counter() - start)

    def _has_key(self, scope: MutableMapping[str, Any]) -> bool:
        if self._digest is None:
            return True
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = _key_in(value)
        # Digests are of one length: the time tells nothing of the key.
        return hmac.compare_digest(_digest(given), self._digest)

    def _log(
        self,
        scope: MutableMapping[str, Any],
        request_id: str,
        status: int,
        num_bytes: int,
        seconds: float,
    ) -> None:
        if self._log_format is None:
            return
        client = scope.get("client") or ("-", 0)
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request_id,
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "bytes": num_bytes,
            "seconds": round(seconds, 6),
        }
        if self._log_format == "json":
            ACCESS_LOG.info(json.dumps(entry))
        else:
            # As JSON strings are, so that no path makes a line of its own.
            entry["path"] = json.dumps(entry["path"])
            ACCESS_LOG.info(" ".join(map(str, entry.values())))


def _key_in(authorization: bytes) -> bytes:
    """The key of `Bearer KEY`, or as the password of `Basic`, which browsers can send."""
    kind, _, value = authorization.partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
