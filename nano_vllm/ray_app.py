"""The server as a Ray Serve deployment: serve run nano_vllm.ray_app:build model=NAME."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any, TypeVar

import msgspec
from ray import serve
from ray.serve import Application

from nano_vllm.config import EngineConfig, reject_unknown
from nano_vllm.server.app import make_app
from nano_vllm.server.guard import Guard
from nano_vllm.server.server_config import KEY_VARIABLE, ServerConfig
from nano_vllm.server.service import Service

LISTENING = ("host", "port", "ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs")
"""Options that are Ray's matter: its proxies listen."""
Config = TypeVar("Config", EngineConfig, ServerConfig)


@serve.deployment
@serve.ingress()
class Server:
    """A replica: all routes, over engines in processes of their own, which end with it.

    Args:
        engine_config: the engine's options.
        config: the server's.
    """

    async def __init__(  # type: ignore[misc]
        self, engine_config: EngineConfig, config: ServerConfig
    ) -> None:
        if config.api_key is None:
            config = replace(config, api_key=os.environ.get(KEY_VARIABLE))
        self._service = Service(engine_config, config)
        await self._service.start()

    def __serve_build_asgi_app__(self) -> Guard:
        return make_app(self._service)

    def check_health(self) -> None:
        """Ray's: where it raises, the replica is replaced."""
        if self._service.status != "ready":
            raise RuntimeError(self._service.status)

    async def __del__(self) -> None:
        await self._service.close()


def build(options: dict[str, Any]) -> Application:
    """The application of `serve run` and of a config file's import_path.

    A replica gets the GPUs that its engines need, unless device is cpu, and as many requests at a
    time as it would take in by itself; a config file's `deployments` may say otherwise.

    Args:
        options: of EngineConfig and ServerConfig, by their names; values may be text. ValueError
            for one that is not known, or whose value is not allowed.
    """
    names = [f.name for f in (*fields(EngineConfig), *fields(ServerConfig))]
    reject_unknown(options, [name for name in names if name not in LISTENING])
    engine_config, config = _config(EngineConfig, options), _config(ServerConfig, options)
    num_ranks = engine_config.tensor_parallel_size * engine_config.pipeline_parallel_size
    num_gpus = 0 if engine_config.device == "cpu" else config.data_parallel_size * num_ranks
    return Server.options(  # type: ignore[attr-defined]
        max_ongoing_requests=(
            config.data_parallel_size * engine_config.max_num_seqs + config.max_queue
        ),
        ray_actor_options={"num_gpus": num_gpus},
    ).bind(engine_config, config)


def _config(kind: type[Config], options: dict[str, Any]) -> Config:
    """From those of the options that are its fields."""
    own = {f.name: options[f.name] for f in fields(kind) if f.name in options}
    try:
        return msgspec.convert(own, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
