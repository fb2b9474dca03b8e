"""The tensors of a step against loops over its sequences, on the random traces of the engine."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nano_vllm.batch import Batch
from nano_vllm.runner import input_batch
from nano_vllm.runner.cuda_graphs import Padding, StepGraphs
from nano_vllm.runner.input_batch import AttentionRow, InputBatch, ModelInput
from nano_vllm.runner.input_layout import decode_layout
from tests.engine import test_scheduler_traces
from tests.engine.fake_runner import FakeRunner

MAX_NUM_SEQS = 16


class PreparingRunner(FakeRunner):
    """Prepares each step and looks at what came of it; every other step fails once before."""

    counts = dict.fromkeys(("plain", "padded", "mixed", "padded mixed", "spread"), 0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        heads = SimpleNamespace(num_kv_heads=8, head_dim=128, windows=lambda: (0,))
        self.input_batch = InputBatch(
            heads,  # type: ignore[arg-type]
            self.max_num_batched_tokens,
            MAX_NUM_SEQS,
            -(-self.max_model_len // self.block_size),
            self.block_size,
            torch.device("cpu"),
            shares_prefixes=True,
            spreads_chunks=True,
        )
        self.graphs = StepGraphs(self.max_num_batched_tokens, MAX_NUM_SEQS)
        self.addresses: dict[tuple[bool, Padding], list[int]] = {}
        self.num_steps = 0

    def launch(self, batch: Batch) -> SimpleNamespace:
        self.num_steps += 1
        if self.num_steps % 5 == 0 and batch.is_decode:
            self._fail_once(batch)
        kind = "plain" if batch.is_decode else "mixed"
        num_rows = batch.num_decodes + len(self.input_batch.prompt_rows(batch))
        self.counts["spread"] += num_rows > len(batch.scheduled)
        padding = self.graphs.padding_for(batch, num_rows) if self.num_steps % 2 else None
        inputs = self.input_batch.prepare(batch, padding)
        self.check(batch, inputs, padding or Padding(batch.num_tokens, num_rows))
        if padding is not None:
            kind = "padded" if batch.is_decode else "padded mixed"
            tensors = (
                inputs.input_ids,
                inputs.positions,
                inputs.attention.slot_mapping,
                inputs.attention.query_start_loc,
                inputs.attention.seq_lens,
                inputs.attention.block_tables,
            )
            addresses = [tensor.data_ptr() for tensor in tensors]
            assert self.addresses.setdefault((batch.is_decode, padding), addresses) == addresses
            assert inputs.attention.max_seq_len >= self.max_model_len
        self.counts[kind] += 1
        return super().launch(batch)

    def _fail_once(self, batch: Batch) -> None:
        def broken(*args: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.input_batch, "_send", broken)
            with pytest.raises(KeyboardInterrupt):
                self.input_batch.prepare(batch)

    def check(self, batch: Batch, inputs: ModelInput, size: Padding) -> None:
        metadata = inputs.attention
        tokens, positions, slots, starts, lens = [], [], [], [0], []
        decodes = [
            AttentionRow(batch.scheduled[row], batch.start(row), 1)
            for row in range(batch.num_decodes)
        ]
        ends = []
        for row, (scheduled, first, num_tokens) in enumerate(
            [*decodes, *self.input_batch.prompt_rows(batch)]
        ):
            sequence = scheduled.sequence
            known = sequence.token_ids + [0] * batch.lead
            for position in range(first, first + num_tokens):
                tokens.append(known[position])
                positions.append(position)
                slots.append(self._slot(sequence, position))
            starts.append(len(tokens))
            lens.append(first + num_tokens)
            if scheduled.samples and lens[-1] == sequence.num_tokens + batch.lead * (
                row < len(decodes)
            ):
                ends.append((row, len(tokens) - 1))
            blocks = sequence.block_table[: -(-lens[-1] // self.block_size)]
            assert metadata.block_tables[row, : len(blocks)].tolist() == blocks
        padding = size.num_tokens - len(tokens)
        assert inputs.input_ids.tolist() == tokens + [0] * padding
        assert inputs.positions.tolist() == positions + [0] * padding
        assert metadata.slot_mapping.tolist() == slots + [-1] * padding
        padding = size.num_seqs - len(lens)
        assert metadata.query_start_loc.tolist() == starts + [len(tokens)] * padding
        assert metadata.seq_lens.tolist() == lens + [0] * padding
        assert metadata.max_query_len >= max(b - a for a, b in pairwise(starts))
        assert metadata.min_query_len <= min(b - a for a, b in pairwise(starts))
        if batch.is_decode:
            assert metadata.max_query_len == 1
        else:
            assert inputs.sampled is not None
            assert inputs.sampled.T.tolist() == [list(end) for end in ends]
            assert len(ends) == sum(s.samples for s in batch.scheduled)
        assert metadata.max_seq_len >= max(lens)


def test_every_step_of_random_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_scheduler_traces, "FakeRunner", PreparingRunner)
    monkeypatch.setattr(input_batch, "MIN_SPREAD_CONTEXT", 4)
    monkeypatch.setattr(input_batch, "DECODE_QUERIES", 2)
    monkeypatch.setattr(input_batch, "SHARED_PREFIX_BYTES", 0)
    for seed in range(60):
        test_scheduler_traces.run_trace(seed)
    assert all(count > 100 for count in PreparingRunner.counts.values())


def test_layout_of_a_padded_size_is_fixed_up_to_the_changes() -> None:
    short, long = decode_layout(8, 3), decode_layout(8, 30)
    assert list(short) == list(long)
    assert list(short)[-1] == "changes"
    assert {n: v for n, v in short.items() if n != "changes"} == {
        n: v for n, v in long.items() if n != "changes"
    }
