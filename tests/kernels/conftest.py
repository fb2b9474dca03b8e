"""Threads for the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def several_threads() -> Iterator[None]:
    """Two at least: how the CPU kernels share out their work is tested on any machine, and where
    test processes have a thread each.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(2, num_threads))
    yield
    torch.set_num_threads(num_threads)
