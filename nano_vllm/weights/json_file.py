"""JSON files of a checkpoint, read with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 128 << 20
"""Of a file that is read whole; the largest tokenizers of well-known models have 35 MB."""


def check_size(path: Path) -> None:
    """ValueError for a file too large to be what it should be."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} must have at most {MAX_BYTES} bytes, got {size}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError naming the file when it is missing or is not one."""
    try:
        check_size(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits too
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
