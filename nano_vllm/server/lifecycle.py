"""The server from its start to its end: loading, serving, draining."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from nano_vllm.config import EngineConfig
from nano_vllm.server.app import make_app
from nano_vllm.server.http_protocol import HttpProtocol
from nano_vllm.server.listener import Listener
from nano_vllm.server.server_config import ServerConfig
from nano_vllm.server.service import Service

LOG = logging.getLogger("nano_vllm.server")
ENGINE_DIED = 1
SEND_BUFFER = 2**18
"""Bytes that wait in the system for a client to take them."""
LAST_WORDS_SECONDS = 3.0
"""For open streams to get their error event, and for whoever watches to see it."""


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to us, and takes connections from a Listener."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        config = self.config

        def make_protocol() -> asyncio.Protocol:
            return HttpProtocol(config, self.server_state, self.lifespan.state)

        await super().startup([])
        for listening in sockets or ():
            listener: Any = Listener(listening, make_protocol, config.ssl)
            self.servers.append(listener)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal or the engine's end.

    Returns:
        the exit code: 0 behind SIGTERM or SIGINT.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    loop = uvicorn.Config("", loop="uvloop").get_loop_factory()
    if sys.version_info >= (3, 12):
        return asyncio.run(_serve(engine_config, config), loop_factory=loop)
    own = loop() if loop is not None else asyncio.new_event_loop()
    try:
        return own.run_until_complete(_serve(engine_config, config))
    finally:
        own.close()


async def _serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    listening = _listen(config)
    service = Service(engine_config, config)
    of_uvicorn = uvicorn.Config(
        make_app(service),
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="critical",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(LAST_WORDS_SECONDS),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_keyfile_password=config.ssl_keyfile_password,
        ssl_ca_certs=config.ssl_ca_certs,
    )
    try:
        of_uvicorn.load()
    except OSError as error:  # ssl's errors are of that kind
        raise ValueError(
            f"ssl_certfile {config.ssl_certfile!r}, ssl_keyfile {config.ssl_keyfile!r} and "
            f"ssl_ca_certs {config.ssl_ca_certs!r} must be a certificate, its key and others: "
            f"{error}"
        ) from None
    server = _Uvicorn(of_uvicorn)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            LOG.info("second signal: stopping at once")
            service.llm.kill()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        return await _live(service, server, serving, stop, listening.getsockname())
    finally:
        await service.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _listen(config: ServerConfig) -> socket.socket:
    """A listening socket; ValueError where there can be none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot listen at {config.host} port {config.port}: {reason}") from None
    # Connections inherit it: by itself the system would hold megabytes for a client that is slow.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return listener


async def _live(
    service: Service,
    server: _Uvicorn,
    serving: asyncio.Task[None],
    stop: asyncio.Event,
    address: tuple[Any, ...],
) -> int:
    loading = asyncio.create_task(_load(service, server, address))
    stopping = asyncio.create_task(stop.wait())
    beginnings: set[asyncio.Future[Any]] = {loading, stopping, serving}
    await asyncio.wait(beginnings, return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and not stop.is_set() and not serving.done():
        try:
            loading.result()
        except BaseException:
            await _end(server, serving)
            raise
        death = service.llm.death
        assert death is not None, "the engine was started"
        ends: set[asyncio.Future[Any]] = {death, stopping, serving}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    exit_code = 0
    death = service.llm.death
    if death is not None and death.done() and not stop.is_set():
        LOG.error("error: %s", death.result())
        exit_code = ENGINE_DIED
        await _drain(service)  # other replicas, where there are some
        await asyncio.sleep(LAST_WORDS_SECONDS / 3)  # for /health to be seen
    elif stop.is_set():
        loading.cancel()
        await _drain(service)
    stopping.cancel()
    await _end(server, serving)
    return exit_code


async def _load(service: Service, server: _Uvicorn, address: tuple[Any, ...]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = address[:2]
    scheme = "https" if service.config.ssl_certfile else "http"
    shown = f"[{host}]" if ":" in host else host
    LOG.info("listening at %s://%s:%d, loading %s", scheme, shown, port, service.model_name)
    start = time.monotonic()
    await service.start()
    gc.freeze()  # what is loaded stays: no collection need look at it
    ready, num_engines = service.llm.ready, service.llm.num_engines
    assert ready is not None
    LOG.info(
        "ready after %.1f s on %s: context %d tokens, KV cache %d blocks of %d%s",
        time.monotonic() - start,
        ready.device,
        ready.max_model_len,
        ready.num_blocks,
        ready.block_size,
        f" in each of {num_engines} replicas" if num_engines > 1 else "",
    )
    if service.defaults:
        LOG.info("defaults of the model's generation_config.json: %s", service.defaults)


async def _drain(service: Service) -> None:
    """Let requests under way end, as long as is allowed."""
    service.is_draining = True
    end = time.monotonic() + service.config.drain_timeout
    if service.num_unfinished:
        LOG.info("draining %d prompts", service.num_unfinished)
    while service.num_unfinished and time.monotonic() < end:
        await asyncio.sleep(0.02)
    if service.num_unfinished:
        LOG.info("aborting %d prompts that did not end in time", service.num_unfinished)
        service.llm.fail_all("the server is shutting down")


async def _end(server: _Uvicorn, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    with contextlib.suppress(SystemExit, asyncio.CancelledError):
        await asyncio.wait({serving}, timeout=2 * LAST_WORDS_SECONDS)
        serving.cancel()
        await serving
