"""What an engine process says arrives whole and in order, and nobody waits for the reader."""

from __future__ import annotations

import socket
from typing import BinaryIO

from nano_vllm.engine.messages import LENGTH, Failed, from_engine_decoder
from nano_vllm.engine.outbox import Outbox


def read(stream: BinaryIO, num_messages: int) -> list[str]:
    texts = []
    for _ in range(num_messages):
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        message = from_engine_decoder.decode(stream.read(length))
        assert isinstance(message, Failed)
        texts.append(message.message)
    return texts


def test_messages_arrive_in_order_whoever_reads_late() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        outbox, stream = Outbox(theirs), ours.makefile("rb")
        texts = [f"{number} " * (number % 500) for number in range(3000)]
        for text in texts[:2000]:
            outbox.send(Failed(text))  # far more than the socket holds
        assert read(stream, 1500) == texts[:1500]
        for text in texts[2000:]:
            outbox.send(Failed(text))
        assert read(stream, 1500) == texts[1500:]
        outbox.close(timeout=10)


def test_a_reader_that_is_gone_breaks_nothing() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        outbox = Outbox(theirs)
        outbox.send(Failed("a" * 2**20))
        ours.close()
        for _ in range(3):
            outbox.send(Failed("b"))
        outbox.close(timeout=10)
