"""Prints a benchmark's rows: tables, then all of it as one JSON line."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from typing import Any


def describe_machine(device: str) -> dict[str, Any]:
    """What a figure is worth nothing without: device, versions, date."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]} x {len(names)}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def report(
    benchmark: str,
    machine: dict[str, Any],
    rows: list[dict[str, Any]],
    table: list[dict[str, str]] | None = None,
    more: dict[str, list[dict[str, Any]]] | None = None,
) -> None:
    """Print the rows; all share the keys of the first.

    Args:
        table: the rows as people are to read them, if not as they are.
        more: other rows, by the name of their table; a table without rows is left out.
    """
    more = more or {}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    _print_table(rows if table is None else table)
    for name, lines in more.items():
        if lines:
            print(f"\n{name}")
            _print_table(lines)
    print(json.dumps({"benchmark": benchmark, **machine, "rows": rows, **more}))


def _print_table(lines: Sequence[dict[str, Any]]) -> None:
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
