"""Prints a benchmark's rows: tables, then all of it as one JSON line."""

from __future__ import annotations

import datetime
import json
import platform
from typing import Any

from nano_vllm.cli import print_table


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
    print_table(rows if table is None else table)
    for name, lines in more.items():
        if lines:
            print(f"\n{name}")
            print_table(lines)
    print(json.dumps({"benchmark": benchmark, **machine, "rows": rows, **more}))
