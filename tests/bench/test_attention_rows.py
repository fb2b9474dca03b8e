"""Peers are compared before they are timed, and one that fails is a gap, not the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nano_vllm.bench import attention_rows, timing
from nano_vllm.bench.attention_grid import AttentionShape, Heads, decode, prefill
from nano_vllm.bench.attention_inputs import AttentionInputs
from nano_vllm.bench.attention_peers import AttentionPeer, Call, prepare_sdpa
from nano_vllm.bench.attention_rows import attention_row, relative_error
from nano_vllm.bench.kernel_row import Setup, table_line
from tests import reference

HEADS = Heads(4, 2, 64)
SHAPE = decode(3, 21)


def result(inputs: AttentionInputs) -> torch.Tensor:
    """What the attention of these inputs is, by the reference."""
    out = torch.empty_like(inputs.query)
    reference.paged_attention(out, *inputs.arguments(), **inputs.options())
    return out


class FakePeer:
    """Answers with the right result, changed by `change`, and counts its calls."""

    def __init__(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.change = change
        self.calls = 0
        self.peer = AttentionPeer("fake", "1", True, self.prepare)

    def prepare(self, inputs: AttentionInputs) -> Call:
        out = result(inputs)

        def call() -> torch.Tensor:
            self.calls += 1
            return self.change(out.clone(), self.calls)

        return call


def setup_with(*peers: AttentionPeer) -> Setup:
    return Setup(torch.device("cpu"), torch.float32, 8, copy=1e9, matmul=1e12, peers=peers)


@pytest.fixture(autouse=True)
def _one_small_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_rows, "input_sets", lambda size, device: 2)
    monkeypatch.setattr(timing, "REPEATS", 3)


def test_right_peer_is_timed() -> None:
    fake = FakePeer(lambda out, _: out)
    row = attention_row(setup_with(fake.peer), HEADS, SHAPE)
    assert row is not None
    assert row["fake us"] > 0
    assert row["fake / ours"] == pytest.approx(row["fake us"] / row["us"])
    assert fake.calls == 1 + 2 * (1 + 3)  # compared; two input sets, warmed up and timed


def wrong_everywhere(out: torch.Tensor, _: int) -> torch.Tensor:
    return out * 1.03


def wrong_in_one_row(out: torch.Tensor, _: int) -> torch.Tensor:
    out[-1, -1] *= 1.03
    return out


def not_a_number(out: torch.Tensor, _: int) -> torch.Tensor:
    out[0, 0, 0] = torch.nan
    return out


@pytest.mark.parametrize("change", [wrong_everywhere, wrong_in_one_row, not_a_number])
def test_wrong_peer_is_refused_before_it_is_timed(
    change: Callable[[torch.Tensor, int], torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakePeer(change)
    row = attention_row(setup_with(fake.peer), HEADS, SHAPE)
    assert row is not None
    assert fake.calls == 1
    assert row["fake us"] is None
    assert row["fake / ours"] is None
    assert row["us"] > 0
    assert table_line(row, ("fake",))["fake (x)"] == "-"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("paged_attention decode 4/2x64 3 x 21 has no fake: ")
    assert "off by" in line


def test_rounding_is_allowed() -> None:
    fake = FakePeer(lambda out, _: out.bfloat16().float())
    row = attention_row(setup_with(fake.peer), HEADS, SHAPE)
    assert row is not None
    assert row["fake us"] is not None


@pytest.mark.parametrize("at_call", [1, 2])  # when compared, when warmed up
def test_raising_peer_is_a_gap(at_call: int, capsys: pytest.CaptureFixture[str]) -> None:
    def change(out: torch.Tensor, count: int) -> torch.Tensor:
        if count == at_call:
            raise RuntimeError("no such kernel\nat some place")
        return out

    other = FakePeer(lambda out, _: out)
    second = AttentionPeer("second", "1", True, other.prepare)
    row = attention_row(setup_with(FakePeer(change).peer, second), HEADS, SHAPE)
    assert row is not None
    assert row["fake us"] is None
    assert row["second us"] > 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("has no fake: RuntimeError: no such kernel")


def test_peer_that_cannot_do_the_shape_is_a_silent_gap(capsys: pytest.CaptureFixture[str]) -> None:
    peer = AttentionPeer("fake", "1", True, lambda inputs: None)
    row = attention_row(setup_with(peer), HEADS, SHAPE)
    assert row is not None
    assert row["fake us"] is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("shape", "rate"), [(SHAPE, "GB/s"), (prefill(2, 5, 6), "TFLOP/s")])
def test_ratios(shape: AttentionShape, rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_rows, "alternate", lambda timers: [2e-6, 3e-6][: len(timers)])
    row = attention_row(setup_with(FakePeer(lambda out, _: out).peer), HEADS, shape)
    assert row is not None
    assert row["us"] == pytest.approx(2)
    assert row["fake us"] == pytest.approx(3)
    assert row["fake / ours"] == pytest.approx(1.5)
    assert row["unit"] == rate
    if rate == "GB/s":
        per_second = 2 * 3 * 21 * 2 * 64 * 4 / 2e-6
        assert row["rate"] == pytest.approx(per_second / 1e9)
        assert row["of ceiling"] == pytest.approx(per_second / 1e9)  # a copy of 1 GB/s
    else:
        per_second = 4 * 4 * 64 * 2 * sum(range(7, 12)) / 2e-6
        assert row["rate"] == pytest.approx(per_second / 1e12)
        assert row["of ceiling"] == pytest.approx(per_second / 1e12)
    assert table_line(row, ("fake",))["fake (x)"] == "3.0 (1.50)"


def test_ours_and_peers_take_turns() -> None:
    order: list[str] = []

    def timer(name: str, seconds: list[float]) -> Callable[[], float]:
        def repeat() -> float:
            order.append(name)
            return seconds[order.count(name) - 1]

        return repeat

    medians = timing.alternate([timer("ours", [5, 1, 2]), timer("peer", [9, 8, 1])])
    assert order == ["ours", "peer"] * 3
    assert medians == [2, 8]


def test_dense_peers_are_left_out_where_their_copy_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paged, dense = attention_rows.bytes_needed(SHAPE, HEADS, 4, 2)
    fakes = [FakePeer(lambda out, _: out) for _ in range(2)]
    peers = [
        AttentionPeer("paged", "1", True, fakes[0].prepare),
        AttentionPeer("dense", "1", False, fakes[1].prepare),
    ]
    monkeypatch.setattr(attention_rows, "free_bytes", lambda device: paged + dense - 1)
    row = attention_row(setup_with(*peers), HEADS, SHAPE)
    assert row is not None
    assert row["paged us"] is not None
    assert row["dense us"] is None
    assert "no dense peers" in capsys.readouterr().err

    monkeypatch.setattr(attention_rows, "free_bytes", lambda device: paged - 1)
    assert attention_row(setup_with(*peers), HEADS, SHAPE) is None
    assert "is skipped" in capsys.readouterr().err


def test_relative_error_takes_any_cut_of_the_same_elements() -> None:
    expected = torch.randn(6, 4, 64)
    assert relative_error(expected.view(2, 3, 4, 64), expected) == 0
    assert relative_error(expected * 1.5, expected) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [SHAPE, prefill(2, 9), prefill(2, 5, prefix=12)])
def test_torch_is_a_peer(shape: AttentionShape) -> None:
    row = attention_row(setup_with(AttentionPeer("torch", "1", False, prepare_sdpa)), HEADS, shape)
    assert row is not None
    assert row["torch us"] > 0, "its result is ours"
