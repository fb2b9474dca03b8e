"""Serve a model over the OpenAI API: python -m nano_vllm.serve [MODEL] [--cpu]."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields

from nano_vllm.cli import (
    ArgumentParser,
    add_engine_arguments,
    add_field_arguments,
    engine_options,
    run_command,
)
from nano_vllm.config import EngineConfig
from nano_vllm.distributed.launch import Launch
from nano_vllm.server.server_config import KEY_VARIABLE, ServerConfig


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 behind a signal, 2 for bad usage, or 1 if the engine failed."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.api_key is None:  # not as the flag's default, which --help shows
        args.api_key = os.environ.get(KEY_VARIABLE)
    try:
        config = ServerConfig(**{f.name: getattr(args, f.name) for f in fields(ServerConfig)})
        engine_config = EngineConfig.from_options(engine_options(args))
    except ValueError as error:
        parser.error(str(error))
    return run_command(lambda: _serve(engine_config, config), args.debug)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m nano_vllm.serve", description="Serve a model over the OpenAI API."
    )
    parser.add_argument(
        "model_argument", nargs="?", metavar="MODEL", action=_SetModel, help="the same as --model"
    )
    parser.add_argument(
        "--cpu",
        action="store_const",
        const="cpu",
        dest="device",
        default=argparse.SUPPRESS,
        help="the same as --device cpu",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_field_arguments(
        parser.add_argument_group("server"),
        ServerConfig,
        [f.name for f in fields(ServerConfig)],
    )
    add_engine_arguments(parser)
    return parser


class _SetModel(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        if values is not None:
            namespace.model = values


def _serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    launch = Launch.from_environment()
    launch.check_replicas(config.data_parallel_size)
    if launch.rank != 0:
        from nano_vllm.engine.engine import Engine

        Engine.from_config(engine_config)  # ends the process when the first rank's is closed
    try:
        from nano_vllm.server.lifecycle import serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the server needs the module {error.name!r}: pip install 'nano_vllm[serve]'"
        ) from None
    return serve(engine_config, config)


if __name__ == "__main__":
    sys.exit(main())
