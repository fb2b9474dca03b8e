"""Random shapes, layouts and values of one test case, all from one seed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest
import torch

Item = TypeVar("Item")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("dense", "aligned", "odd")

SENTINEL = -416.0
"""Fills what an op must leave alone; exact in every dtype."""

FLOAT8 = torch.float8_e4m3fn

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])

each_cache = pytest.mark.parametrize("float8", [False, True], ids=["same", "float8"])
"""A KV cache of the dtype under test, or of float8."""


def random_cases(count: int) -> pytest.MarkDecorator:
    """Runs a test on `count` fresh seeds, times NANO_VLLM_TEST_CASES from the environment."""
    factor = int(os.environ.get("NANO_VLLM_TEST_CASES") or 1)
    return pytest.mark.parametrize("case", range(count * factor))


def seeds(seed: int, count: int) -> Iterator[int]:
    """Seeds of the many small cases of one test, each told on stdout before its case runs, so that
    a failure ends with its own; NANO_VLLM_TEST_CASE in the environment runs one case alone.
    """
    alone = os.environ.get("NANO_VLLM_TEST_CASE")
    for case in range(count) if alone is None else [int(alone)]:
        print(f"case {case}, alone with NANO_VLLM_TEST_CASE={case} in front of the line above:")
        yield seed + case


class Draw:
    """Random choices, and random tensors on `device` that are the same for every device."""

    def __init__(self, seed: int, device: str) -> None:
        self.device = device
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def choice(self, items: Sequence[Item]) -> Item:
        return self._random.choice(items)

    def between(self, low: int, high: int) -> int:
        """Both included."""
        return self._random.randint(low, high)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)

    def sample(self, population: int, count: int) -> list[int]:
        """`count` different numbers below `population`, in random order."""
        return self._random.sample(range(population), count)

    def normal(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def scales(self, num_heads: int) -> torch.Tensor:
        """Of the heads of a float8 cache: different ones, or all the same."""
        if self.choice((True, False)):
            return torch.full((num_heads,), self.uniform(0.01, 0.1), device=self.device)
        return self.strided(
            torch.tensor([self.uniform(0.01, 2.0) for _ in range(num_heads)], device=self.device)
        )

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Both included."""
        values = torch.randint(low, high + 1, shape, generator=self._generator)
        return values.to(self.device, dtype)

    def strided(
        self, tensor: torch.Tensor, fill: float = torch.nan, layout: str | None = None
    ) -> torch.Tensor:
        """The same values as a view into a larger storage, the rest of which holds `fill`.

        Args:
            tensor: values; the last dimension stays contiguous.
            fill: what the gaps hold.
            layout: "dense" has no gaps; "aligned" and "odd" have some in front, between and behind,
                with the outer dimensions in random order, all strides and the offset multiples of 8
                elements or anything; of rows of 8 n elements, "odd" never has all of them
                multiples of 8. By default one of the three.
        """
        layout = layout or self.choice(LAYOUTS)
        if layout == "dense":
            return tensor.clone(memory_format=torch.contiguous_format)
        unit = 8 if layout == "aligned" else 1
        order = self.sample(tensor.dim() - 1, tensor.dim() - 1)
        sizes = [tensor.shape[dim] + self.between(0, 2) for dim in order]
        gap = self.between(0, 3)
        sizes.append(-(-tensor.shape[-1] // unit) * unit + unit * gap)
        offset = self.between(1 if layout == "odd" and gap == 0 else 0, 3)
        storage = torch.full(
            (unit * offset + torch.Size(sizes).numel(),),
            fill,
            dtype=tensor.dtype,
            device=self.device,
        )
        gapped = storage[storage.numel() - torch.Size(sizes).numel() :].view(sizes)
        view = gapped.permute([order.index(dim) for dim in range(len(order))] + [len(order)])
        for dim, size in enumerate(tensor.shape):
            view = view.narrow(dim, 0, size)
        return view.copy_(tensor)

    def output(self, *shape: int, dtype: torch.dtype, layout: str | None = None) -> torch.Tensor:
        """To be overwritten: NaN, with the sentinel in the gaps."""
        poison = torch.full(shape, torch.nan, dtype=dtype, device=self.device)
        return self.strided(poison, SENTINEL, layout)
