"""The page at `/`."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def page_html() -> str:
    """The whole page: it loads nothing else."""
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
