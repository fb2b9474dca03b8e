"""Accepts connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable

LOG = logging.getLogger("nano_vllm")
MAX_AT_ONCE = 256
"""Connections; others have their turn between so many and the next."""
PAUSE_SECONDS = 0.2
"""Where the process has no file descriptor left for another."""


class Listener:
    """Takes all connections that wait, each time. uvloop's own server takes one in a turn of the
    event loop, and in a turn hundreds of streams can get their tokens: the last of many that came
    at once would wait for as many turns.

    Args:
        listening: the socket; who made it closes it.
        make_protocol: for each connection.
        tls: None for plain connections.
    """

    def __init__(
        self,
        listening: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._listening = listening
        self._make_protocol = make_protocol
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listening.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._listening)

    async def wait_closed(self) -> None:
        """As a server of asyncio has it; there is nothing to wait for."""

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_AT_ONCE):
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                LOG.error("cannot accept a connection: %s", (error.strerror or "").lower())
                self._loop.remove_reader(self._listening)
                self._pause = self._loop.call_later(PAUSE_SECONDS, self._resume)
                return
            task = self._loop.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            # Closes it where TLS cannot be agreed on.
            await self._loop.connect_accepted_socket(self._make_protocol, connection, ssl=self._tls)
        except (OSError, asyncio.TimeoutError):  # ssl's errors are of the first kind
            with contextlib.suppress(OSError):
                connection.close()
