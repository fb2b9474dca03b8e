"""Connections that come at once."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest
import uvloop

from nano_vllm.server import listener as module
from nano_vllm.server.listener import Listener

COUNT = 100


class Counting(asyncio.Protocol):
    made: list[Counting]

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.made.append(self)


@pytest.fixture
def listening() -> Any:
    with socket.create_server(("127.0.0.1", 0), backlog=2 * COUNT) as listening:
        clients = [socket.create_connection(listening.getsockname()) for _ in range(COUNT)]
        yield listening
        for client in clients:
            client.close()


def protocol_of(made: list[Counting]) -> type[Counting]:
    return type("Mine", (Counting,), {"made": made})


def run(scenario: Any) -> None:
    """By the event loop that the server has."""
    uvloop.run(scenario)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_all_that_wait_are_taken_in_one_turn(listening: socket.socket) -> None:
    made: list[Counting] = []

    async def scenario() -> None:
        listener = Listener(listening, protocol_of(made), None)
        await turns(8)
        listener.close()
        for protocol in made:
            no_delay = protocol.transport.get_extra_info("socket").getsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY
            )
            assert no_delay
            protocol.transport.abort()
        await turns(8)

    run(scenario())
    assert len(made) == COUNT


def test_others_have_their_turn_between(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_AT_ONCE", 7)
    made: list[Counting] = []
    counts = []

    async def scenario() -> None:
        listener = Listener(listening, protocol_of(made), None)
        while len(made) < COUNT:
            before = len(made)
            await turns(1)
            counts.append(len(made) - before)
        listener.close()

    run(scenario())
    assert max(counts) <= 7


def test_no_more_behind_the_end(listening: socket.socket) -> None:
    made: list[Counting] = []

    async def scenario() -> None:
        Listener(listening, protocol_of(made), None).close()
        await turns(20)

    run(scenario())
    assert not made


def test_files_run_out(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once, and goes on when there are some again."""
    made: list[Counting] = []
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)

    class NoneLeft:
        is_exhausted = True

        def __getattr__(self, name: str) -> Any:
            return getattr(listening, name)

        def accept(self) -> Any:
            if self.is_exhausted:
                self.is_exhausted = False
                raise OSError(errno.EMFILE, "Too many open files")
            return listening.accept()

    async def scenario() -> None:
        listener = Listener(NoneLeft(), protocol_of(made), None)  # type: ignore[arg-type]
        while len(made) < COUNT:
            await asyncio.sleep(0.005)
        listener.close()

    run(scenario())
    assert caplog.text.count("cannot accept a connection: too many open files") == 1
