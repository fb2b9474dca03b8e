"""Devices and fresh random numbers for all tests.

NANO_VLLM_TEST_SEED in the environment repeats a run; by default each run draws its own seed, and a
failure prints it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])
# Read as torch is loaded. Idle threads sleep: they would spin on a core that others have work for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers and what they start share the cores
SEED = int(os.environ.get("NANO_VLLM_TEST_SEED") or random.SystemRandom().getrandbits(31))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_cuda = [item for item in items if item.get_closest_marker("cuda")]
    reason = _why_no_cuda() if needing_cuda else None
    if reason is not None:
        for item in needing_cuda:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_cuda() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    from nano_vllm import ops

    return None if ops.has_cuda() else "built without CUDA kernels"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test live: each test that asks for it runs on the CPU and on a GPU."""
    return request.param


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of this run and this test case alone; a failure prints how to draw it again."""
    print(f"to repeat: NANO_VLLM_TEST_SEED={SEED} pytest '{request.node.nodeid}'")
    return random.Random(f"{SEED} {request.node.nodeid}").getrandbits(63)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama."""
    from tests.models.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine tiny tensors wait long for a second one."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
