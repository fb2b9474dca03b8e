"""uvicorn's HTTP protocol, for clients that cannot be trusted to finish what they begin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nano_vllm.server.errors import invalid
from nano_vllm.server.generation import ABORT_CONNECTION, CAN_WRITE, WHEN_GONE, WRITE_PART

HEADER_SECONDS = 30.0
"""From the first byte of a connection, or of a request, to the end of its headers."""
MAX_HEADER_BYTES = 65536


class HttpProtocol(HttpToolsProtocol):
    """Drops connections whose headers do not come, or do not end. Parts of a stream need not go
    through all that stands between the application and the connection.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _num_header_bytes = 0
    _in_headers = True
    _then: Callable[[], None] | None = None
    """What to do once the client has gone."""
    _is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)
        self._is_lost = True
        if self._then is not None:
            self._then()

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._num_header_bytes += len(data)
        super().data_received(data)
        # What came with the end of the headers is body; what is short of it are headers still.
        if self._in_headers and self._num_header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        self._start_header_timer()
        extensions: dict[str, Any] = {
            ABORT_CONNECTION: self.transport.abort,
            WRITE_PART: self._write_part,
            CAN_WRITE: self._can_write,
            WHEN_GONE: self._when_gone,
        }
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._num_header_bytes = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def _write_part(self, body: bytes) -> bool:
        """Write what follows of a response whose head was sent and whose end was not; False where
        nothing can be written now.
        """
        if not self._can_write():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    def _can_write(self) -> bool:
        # Where another request has come already, the cycle is that one's, whose head was not sent.
        cycle = self.cycle
        return not (self.flow.write_paused or cycle.disconnected) and bool(cycle.chunked_encoding)

    def _when_gone(self, then: Callable[[], None] | None) -> None:
        self._then = then
        if self._is_lost and then is not None:
            then()

    def send_400_response(self, msg: str) -> None:
        body = msgspec.json.encode(invalid(msg.lower().rstrip(".")).response)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
