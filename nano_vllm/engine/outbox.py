"""Messages on their way out of the engine process."""

from __future__ import annotations

import queue
import socket
import threading

from nano_vllm.engine.messages import FromEngine, encode


class Outbox:
    """Sends what the socket takes at once, where a thread would have to wait until the next step is
    launched; such a thread sends the rest. Whoever sends never waits for the reader.

    Args:
        connection: to the API process.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_waiting = 0
        """Messages of which a part is still to be sent."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._send_rest, daemon=True)
        self._thread.start()

    def send(self, message: FromEngine) -> None:
        data = encode([message])
        with self._lock:
            num_sent = self._send_now(data) if self._num_waiting == 0 else 0
            if num_sent < len(data):
                self._num_waiting += 1
                self._rest.put(data[num_sent:])

    def close(self, timeout: float) -> None:
        """Send all that is left, in as many seconds at the most."""
        self._rest.put(None)
        self._thread.join(timeout)

    def _send_now(self, data: bytes) -> int:
        try:
            return self._connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:  # the reader is gone, which ends the process by other ways
            return len(data)

    def _send_rest(self) -> None:
        while (data := self._rest.get()) is not None:
            try:
                self._connection.sendall(data)
            except OSError:
                return
            with self._lock:
                self._num_waiting -= 1
