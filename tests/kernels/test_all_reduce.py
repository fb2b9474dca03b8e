"""Sums over ranks: several on one GPU, each with a stream and a buffer of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nano_vllm import ops

MAX_BYTES = 1 << 20
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = ["one-shot", "two-shot", "plain"]
EPS = 1e-5


class Ranks:
    """Ranks whose kernels run at the same time on one GPU, which is large enough for all.

    Of each rank a call is on the GPU, and maybe the next one, which waits there: all of them
    together must have no more blocks than fit.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._like = torch.empty(0, device="cuda")
        size = ops.peer_buffer_bytes(MAX_BYTES, count)
        self._addresses = [ops.allocate_peer_buffer(self._like, size) for _ in range(count)]
        self._buffers = torch.tensor(self._addresses)
        self.streams = [torch.cuda.Stream() for _ in range(count)]

    def all_reduce(self, rank: int, out: torch.Tensor, *args: Any) -> None:
        """As the op, from its input on, without what is of the ranks."""
        source, way, *norm = args
        ops.all_reduce(out, source, self._buffers, rank, MAX_BYTES, way, *norm)

    def run(self, call: Callable[[int], None]) -> None:
        """The same on all ranks, which are waited for."""
        torch.cuda.synchronize()
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                call(rank)
        torch.cuda.synchronize()

    def close(self) -> None:
        for address in self._addresses:
            ops.release_peer_buffer(self._like, address, is_own=True)


@pytest.fixture(params=[2, 3, 4, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    # A kernel is loaded when it is first launched, for which nothing else may be running.
    for dtype in DTYPES:
        for way in WAYS:
            xs = [torch.zeros(1, 64, device="cuda", dtype=dtype) for _ in range(ranks.count)]
            ranks.run(lambda rank, xs=xs, way=way: ranks.all_reduce(rank, xs[rank], xs[rank], way))
    torch.cuda._sleep(1)
    yield ranks
    ranks.close()


def expected_sum(inputs: list[torch.Tensor]) -> torch.Tensor:
    """In float32 and in the order of the ranks, near that in float64."""
    total = torch.zeros_like(inputs[0], dtype=torch.float32)
    exact = torch.zeros_like(inputs[0], dtype=torch.float64)
    size = exact.clone()
    for x in inputs:
        total += x.float()
        exact += x.double()
        size += x.double().abs()
    rounded = total.to(inputs[0].dtype)
    error = torch.finfo(rounded.dtype).eps / 2 + len(inputs) * 2.0**-24
    assert ((rounded.double() - exact).abs() <= error * size).all()
    return rounded


def random_inputs(count: int, rows: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(rows, size, device="cuda").to(dtype) for _ in range(count)]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_get_the_sum_bit_for_bit(
    seed: int, ranks: Ranks, dtype: torch.dtype, way: str
) -> None:
    """Calls of all shapes one behind the other, in and out of place."""
    torch.manual_seed(seed)
    for number, (rows, size) in enumerate(
        [(1, 4096), (7, 1024), (1, 8), (3, 264), (2, 9216), (16, 2048), (0, 64), (1, 4096)]
    ):
        inputs = random_inputs(ranks.count, rows, size, dtype)
        expected = expected_sum(inputs)
        outs = inputs if number % 2 else [torch.full_like(x, float("nan")) for x in inputs]
        ranks.run(
            lambda rank, outs=outs, inputs=inputs: ranks.all_reduce(
                rank, outs[rank], inputs[rank], way
            )
        )
        for out in outs:
            assert torch.equal(out, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("way", WAYS)
def test_blocks_take_turns_at_more_rows(seed: int, ranks: Ranks, way: str) -> None:
    """Than there are blocks: two for each SM, of a warp."""
    torch.manual_seed(seed)
    rows = 5 * torch.cuda.get_device_properties(0).multi_processor_count + 3
    inputs = random_inputs(ranks.count, rows, 64, torch.bfloat16)
    expected = expected_sum(inputs)
    weight = torch.randn(64, device="cuda").bfloat16()
    for norm in (False, True):
        residual = torch.randn(rows, 64, device="cuda").bfloat16()
        residuals = [residual.clone() for _ in inputs]
        outs = [torch.full_like(x, float("nan")) for x in inputs]

        def call(
            rank: int,
            norm: bool = norm,
            outs: list[torch.Tensor] = outs,
            residuals: list[torch.Tensor] = residuals,
        ) -> None:
            more = (residuals[rank], weight, EPS) if norm else ()
            ranks.all_reduce(rank, outs[rank], inputs[rank], way, *more)

        ranks.run(call)
        wanted = expected.clone()
        if norm:
            ops.fused_add_rms_norm(wanted, wanted, residual, weight, EPS)
        for out, own in zip(outs, residuals, strict=True):
            assert torch.equal(out, wanted)
            assert torch.equal(own, residual)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [64, 1024, 4096, 9216])
def test_the_norm_behind_the_sum_is_that_of_two_kernels(
    seed: int, ranks: Ranks, dtype: torch.dtype, way: str, size: int
) -> None:
    torch.manual_seed(seed)
    for rows in (1, 5):
        weight = torch.randn(size, device="cuda").to(dtype)
        inputs = random_inputs(ranks.count, rows, size, dtype)
        residual = torch.randn(rows, size, device="cuda").to(dtype)
        residuals = [residual.clone() for _ in inputs]
        expected = expected_sum(inputs)
        ops.fused_add_rms_norm(expected, expected, residual, weight, EPS)
        ranks.run(
            lambda rank, inputs=inputs, residuals=residuals, weight=weight: ranks.all_reduce(
                rank, inputs[rank], inputs[rank], way, residuals[rank], weight, EPS
            )
        )
        for x, own in zip(inputs, residuals, strict=True):
            assert torch.equal(own, residual)
            assert torch.equal(x, expected)


@pytest.mark.cuda
def test_calls_follow_one_another_at_each_ranks_own_pace(seed: int, ranks: Ranks) -> None:
    """Many, of all sizes and in all ways, none of which is waited for; some ranks fall behind."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    calls = []
    for _ in range(60):
        dtype = draw.choice(DTYPES)
        inputs = random_inputs(ranks.count, draw.randint(1, 8), 8 * draw.randint(1, 64), dtype)
        outs = [torch.full_like(x, float("nan")) for x in inputs]
        calls.append((inputs, outs, draw.choice(WAYS)))
    pauses = [[draw.choice([0, 0, 0, 100_000]) for _ in calls] for _ in range(ranks.count)]

    def run_all(rank: int) -> None:
        for pause, (inputs, outs, way) in zip(pauses[rank], calls, strict=True):
            if pause:
                torch.cuda._sleep(pause)
            ranks.all_reduce(rank, outs[rank], inputs[rank], way)

    ranks.run(run_all)
    for inputs, outs, _ in calls:
        expected = expected_sum(inputs)
        for out in outs:
            assert torch.equal(out, expected)


@pytest.mark.cuda
def test_many_calls_in_a_graph_that_is_replayed(seed: int, ranks: Ranks) -> None:
    """Their numbers go on from replay to replay; replays follow one another unwaited for."""
    torch.manual_seed(seed)
    ways = [WAYS[i] for i in (0, 1, 1, 2, 2, 0, 0, 0, 2, 0, 2, 1, 2, 1, 1)]
    inputs = random_inputs(ranks.count, 4, 512, torch.float32)
    xs = [torch.empty_like(x) for x in inputs]
    history = [torch.empty(3, *x.shape, device="cuda") for x in inputs]
    graphs = []
    for rank in range(ranks.count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            xs[rank].copy_(inputs[rank])
            for way in ways:
                xs[rank].mul_(0.5)
                ranks.all_reduce(rank, xs[rank], xs[rank], way)
            inputs[rank].add_(1)
        graphs.append(graph)

    def replay(rank: int) -> None:
        for kept in history[rank]:
            graphs[rank].replay()
            kept.copy_(xs[rank])

    for _ in range(3):
        for x in inputs:
            x.normal_()
        starts = [x.clone() for x in inputs]
        ranks.run(replay)
        for i in range(3):
            expected = [x.clone() for x in starts]
            for _ in ways:
                expected = [expected_sum([x * 0.5 for x in expected])] * ranks.count
            for kept in history:
                assert torch.equal(kept[i], expected[0])
            for x in starts:
                x.add_(1)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"buffers": torch.zeros(1, dtype=torch.int64)}, "there must be 2 to 8 buffers, got 1"),
        ({"buffers": torch.zeros(2)}, "buffers must be int64, got float32"),
        ({"max_bytes": 16}, "a one-shot message has at most 16 bytes, got 128"),
        (
            {"max_bytes": 96, "way": "two-shot"},
            "a two-shot message has at most 96 bytes, got 128",
        ),
        ({"max_bytes": 112, "way": "plain"}, "a plain message has at most 112 bytes, got 128"),
        ({"max_bytes": 0}, "max_bytes must be a positive multiple of 16, got 0"),
        ({"max_bytes": 1000}, "max_bytes must be a positive multiple of 16, got 1000"),
        ({"way": "ring"}, "way must be one-shot, two-shot or plain, got ring"),
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
        "way": "one-shot",
        "residual": x.clone(),
        "weight": x[0].clone(),
    }
    with pytest.raises(ValueError, match=message):
        ops.all_reduce(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["one-shot", "plain"])
def test_whole_messages_are_as_large_as_there_is_room_for(way: str) -> None:
    x = torch.zeros(1 << 13, 16, device="cuda")
    buffers = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"a {way} message has at most 262144 bytes, got 524"):
        ops.all_reduce(x, x, buffers, 0, MAX_BYTES, way)


@pytest.mark.cuda
def test_rows_of_a_few_bytes_are_refused() -> None:
    x = torch.zeros(2, 3, device="cuda")
    with pytest.raises(ValueError, match="a row must be a multiple of 16 bytes, got 12"):
        ops.all_reduce(x, x, torch.zeros(2, dtype=torch.int64), 0, 1024, "one-shot")


def test_a_cpu_has_no_peers() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="got a tensor on cpu"):
        ops.all_reduce(x, x, torch.zeros(2, dtype=torch.int64), 0, 1024, "one-shot")
    with pytest.raises(ValueError, match=r"num_ranks must be in \[2, 8\], got 9"):
        ops.peer_buffer_bytes(1024, 9)


def test_buffers_have_room_for_a_share_twice_and_for_plain_rows() -> None:
    """Of each rank in each of two calls: a share twice with as many flags, flags of blocks, and
    what is summed in one shot.
    """
    for count in range(2, 9):
        share = -(-MAX_BYTES // (512 * count)) * 512
        of_sender = 2 * 2 * share + 4 * 512 + min(2 * share, MAX_BYTES)
        assert ops.peer_buffer_bytes(MAX_BYTES, count) == 256 + 2 * count * of_sender
