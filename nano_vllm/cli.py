"""Command-line flags from dataclass fields, errors of one line, and tables."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from nano_vllm.config import EngineConfig

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
PLOT_FORMATS = (".png", ".svg", ".pdf")
SHORT_FLAGS = {
    "tensor_parallel_size": ("--tp",),
    "pipeline_parallel_size": ("--pp",),
    "data_parallel_size": ("--dp",),
}
"""Fields that have other flags beside that of their name."""


class ArgumentParser(argparse.ArgumentParser):
    """Ends with one line and exit code 2 on bad usage; an unknown flag names the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists what is known"
            self.error(f"unknown option {flag!r}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message}\n")


def add_engine_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """A flag for each field of EngineConfig; `defaults` where they differ from its own."""
    group = parser.add_argument_group("engine")
    add_field_arguments(group, EngineConfig, [f.name for f in fields(EngineConfig)], **defaults)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `EngineConfig.from_options` among the parsed arguments."""
    return {f.name: getattr(args, f.name) for f in fields(EngineConfig)}


def add_field_arguments(
    parser: argparse._ActionsContainer,
    dataclass: type,
    names: Sequence[str],
    **defaults: Any,
) -> None:
    """Flags for fields of a dataclass, with the fields' types, defaults and docstrings.

    Args:
        parser: gets the flags.
        dataclass: fields of type str, int, float or bool, or one of them or None.
        names: of the fields.
        defaults: where they differ from the dataclass's.
    """
    by_name = {f.name: f for f in fields(dataclass)}
    documentation = _field_docstrings(dataclass)
    for name in names:
        field = by_name[name]
        flags = ["--" + name.replace("_", "-"), *SHORT_FLAGS.get(name, ())]
        default = defaults.get(name, field.default)
        text = documentation[name].replace("%", "%%")
        if default is not None:
            text += f" [{default}]"
        kind = str(field.type).removesuffix(" | None")
        if kind == "bool":
            parser.add_argument(
                *flags, action=argparse.BooleanOptionalAction, default=default, help=text
            )
            continue
        parser.add_argument(
            *flags, type=_TYPES[kind], default=default, metavar=_METAVARS[kind], help=text
        )


_TYPES: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
_METAVARS = {"str": "NAME", "int": "N", "float": "X"}


def _field_docstrings(dataclass: type) -> dict[str, str]:
    """The string that follows each field in the source."""
    body = ast.parse(inspect.getsource(dataclass)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def run_command(command: Callable[[], int], debug: bool) -> int:
    """The exit code of a command; what it raises becomes one line, unless `debug`.

    Args:
        command: returns its exit code.
        debug: let errors through, with their traceback.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) and message else f"{type(error).__name__}: "
        print_error(f"{kind}{message}")
        return FAILURE


def print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def check_plot(path: str) -> None:
    """ValueError for a picture that could not be drawn once all has run."""
    if Path(path).suffix not in PLOT_FORMATS:
        raise ValueError(f"--plot must end with {', '.join(PLOT_FORMATS)}, got {path}")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib (pip install matplotlib): {error}")


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """Rows that share the keys of the first, under these."""
    columns = list(lines[0])
    cells = [[_text(line[column]) for column in columns] for line in lines]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, ["-" * width for width in widths], *cells):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
