"""Sums over ranks: several on one GPU, each with a stream and a buffer of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nano_vllm import ops

MAX_BYTES = 1 << 18


class Ranks:
    """Ranks whose kernels run at the same time on one GPU, which is large enough for all."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._like = torch.empty(0, device="cuda")
        size = ops.peer_buffer_bytes(MAX_BYTES, count)
        self._addresses = [ops.allocate_peer_buffer(self._like, size) for _ in range(count)]
        self.buffers = torch.tensor(self._addresses)
        self._streams = [torch.cuda.Stream() for _ in range(count)]

    def run(self, call: Callable[[int], None]) -> None:
        """The same on all ranks."""
        torch.cuda.synchronize()
        for rank, stream in enumerate(self._streams):
            with torch.cuda.stream(stream):
                call(rank)
        torch.cuda.synchronize()

    def close(self) -> None:
        for address in self._addresses:
            ops.release_peer_buffer(self._like, address, is_own=True)


def expected_sum(inputs: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(inputs[0], dtype=torch.float32)
    for x in inputs:
        total += x.float()
    return total.to(inputs[0].dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_all_ranks_get_the_sum_bit_for_bit(seed: int, dtype: torch.dtype, count: int) -> None:
    """Calls of all shapes one behind the other, in and out of place."""
    torch.manual_seed(seed)
    ranks = Ranks(count)
    for number, (rows, size) in enumerate(
        [(1, 4096), (7, 1024), (1, 8), (3, 264), (2, 9216), (16, 2048), (0, 64), (1, 4096)]
    ):
        inputs = [torch.randn(rows, size, device="cuda").to(dtype) for _ in range(count)]
        expected = expected_sum(inputs)
        outs = inputs if number % 2 else [torch.full_like(x, float("nan")) for x in inputs]
        ranks.run(
            lambda rank, outs=outs, inputs=inputs: ops.all_reduce(
                outs[rank], inputs[rank], ranks.buffers, rank, MAX_BYTES
            )
        )
        for out in outs:
            assert torch.equal(out, expected)
    ranks.close()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 1024, 4096, 9216])
def test_the_norm_behind_the_sum_is_that_of_two_kernels(
    seed: int, dtype: torch.dtype, size: int
) -> None:
    torch.manual_seed(seed)
    ranks = Ranks(2)
    for rows in (1, 5, 12):
        weight = torch.randn(size, device="cuda").to(dtype)
        inputs = [torch.randn(rows, size, device="cuda").to(dtype) for _ in range(2)]
        residual = torch.randn(rows, size, device="cuda").to(dtype)
        residuals = [residual.clone() for _ in range(2)]
        expected = expected_sum(inputs)
        ops.fused_add_rms_norm(expected, expected, residual, weight, 1e-5)
        ranks.run(
            lambda rank, inputs=inputs, residuals=residuals, weight=weight: ops.all_reduce(
                inputs[rank],
                inputs[rank],
                ranks.buffers,
                rank,
                MAX_BYTES,
                residuals[rank],
                weight,
                1e-5,
            )
        )
        for rank in range(2):
            assert torch.equal(residuals[rank], residual)
            assert torch.equal(inputs[rank], expected)
    ranks.close()


@pytest.mark.cuda
def test_many_calls_in_a_graph_that_is_replayed(seed: int) -> None:
    """Their numbers go on from replay to replay."""
    torch.manual_seed(seed)
    ranks = Ranks(2)
    inputs = [torch.randn(4, 512, device="cuda") for _ in range(2)]
    xs = [torch.empty_like(x) for x in inputs]
    graphs = []
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            xs[rank].copy_(inputs[rank])
            for _ in range(9):
                ops.all_reduce(xs[rank], xs[rank], ranks.buffers, rank, MAX_BYTES)
        graphs.append(graph)
    for _ in range(5):
        for x in inputs:
            x.normal_()
        expected = inputs
        for _ in range(9):
            expected = [expected_sum(expected)] * 2
        ranks.run(lambda rank: graphs[rank].replay())
        assert torch.equal(xs[0], expected[0])
        assert torch.equal(xs[1], expected[0])
    ranks.close()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"buffers": torch.zeros(1, dtype=torch.int64)}, "there must be 2 to 8 buffers, got 1"),
        ({"buffers": torch.zeros(2)}, "buffers must be int64, got float32"),
        ({"max_bytes": 16}, "a message has at most 16 bytes, got 128"),
        ({"weight": None}, "residual and weight come together"),
        ({"out": torch.zeros(2, 16)}, "out must be on cuda:0, got cpu"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    x = torch.zeros(2, 16, device="cuda")
    arguments = {
        "out": x,
        "input": x,
        "buffers": torch.zeros(2, dtype=torch.int64),
        "rank": 0,
        "max_bytes": 1024,
        "residual": x.clone(),
        "weight": x[0].clone(),
    }
    with pytest.raises(ValueError, match=message):
        ops.all_reduce(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.cuda
def test_rows_of_a_few_bytes_are_refused() -> None:
    x = torch.zeros(2, 3, device="cuda")
    with pytest.raises(ValueError, match="a row must be a multiple of 16 bytes, got 12"):
        ops.all_reduce(x, x, torch.zeros(2, dtype=torch.int64), 0, 1024)


def test_a_cpu_has_no_peers() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="got a tensor on cpu"):
        ops.all_reduce(x, x, torch.zeros(2, dtype=torch.int64), 0, 1024)
    with pytest.raises(ValueError, match=r"num_ranks must be in \[2, 8\], got 9"):
        ops.peer_buffer_bytes(1024, 9)
