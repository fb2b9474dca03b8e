"""Turns a batch into the tensors that the model reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nano_vllm import ops
from nano_vllm._core import DecodeStep, find_shared_prefixes, prepare_batch
from nano_vllm.batch import Batch, ScheduledSequence
from nano_vllm.config import ModelConfig
from nano_vllm.layers.attention import AttentionMetadata, LastTokens
from nano_vllm.runner.graph_shapes import StepShape
from nano_vllm.runner.input_layout import (
    Layout,
    ahead_of_tables,
    array_bytes,
    decode_layout,
    layout_bytes,
    staging_bytes,
)
from nano_vllm.runner.limits import DECODE_QUERIES

SHARED_PREFIX_BYTES = 32 << 20
"""Of keys and values of a layer that reading a prefix once must spare: 11 us of memory time on an
H100, about what the kernel that reads it costs besides."""

MAX_SPREAD_TOKENS = 256
"""Of a chunk."""
MIN_SPREAD_CONTEXT = 2048
"""Tokens behind which a chunk is spread: 16 tiles of the prefill kernel."""
SPREAD_PAIRS = 6
"""And one more for each so many pairs of its tokens, which read what they see of each other each by
itself. On an H200 chunks of 88, 152 and 248 tokens gain from some 3,000, 5,000 and 11,000 on."""

_DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "int32": (np.int32, torch.int32),
    "int64": (np.int64, torch.int64),
}
"""By their names in a Layout, for host and device."""
Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class ModelInput:
    """One step's input, on the device."""

    input_ids: torch.Tensor
    """[num_tokens], int64."""
    positions: torch.Tensor
    """[num_tokens], int64."""
    attention: AttentionMetadata
    sampled: torch.Tensor | None = None
    """[2, num_sampled], int64: rows that sample, and the last of each one's tokens among the
    step's. None for a step of decodes, whose rows all do.
    """


class AttentionRow(NamedTuple):
    """A sequence's part of a step as attention sees it."""

    scheduled: ScheduledSequence
    start: int
    num_tokens: int


class StagedInput(NamedTuple):
    """What the staging buffer holds: with it, any rank finds the step's tensors in the same
    bytes.
    """

    slot: int
    """Which of the staging buffers."""
    num_bytes: int
    is_decode: bool
    is_padded: bool
    num_tokens: int
    """With padding, as is the next."""
    num_seqs: int
    num_tables: int
    """Rows of the block tables, and columns; of a step of decodes, which has none, 0."""
    table_width: int
    num_changes: int
    """Of a step of decodes: of the device's block tables."""
    num_sampled: int
    """Rows that sample."""
    min_query_len: int
    max_query_len: int
    max_seq_len: int
    is_shared: bool
    """Whether sequences share a prefix that is to be read once."""


class Slot:
    """A staging buffer, and where its bytes go.

    Args:
        num_bytes: of the largest step.
        buffer: on the device; None on a CPU, which reads the staging buffer itself.
    """

    def __init__(self, num_bytes: int, buffer: torch.Tensor | None) -> None:
        on_gpu = buffer is not None
        self.staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.buffer = self.staging if buffer is None else buffer
        self.copied = torch.cuda.Event() if on_gpu else None
        self._decode_views: dict[int, tuple[Arrays, Tensors, int]] = {}
        """By size: `decode_layout` on host and device, and its bytes ahead of the changes."""
        self._mixed_views: dict[tuple[int, int], tuple[Arrays, Tensors, int]] = {}
        """By padding: `ahead_of_tables`, likewise, and its bytes."""
        self._host = self.staging.numpy()

    def decode_arrays(self, size: int, max_blocks_per_seq: int) -> tuple[Arrays, Tensors, int]:
        if size not in self._decode_views:
            layout = decode_layout(size, size * max_blocks_per_seq)
            num_bytes = layout_bytes(decode_layout(size, 0))
            self._decode_views[size] = self._on_host(layout), self._on_device(layout), num_bytes
        return self._decode_views[size]

    def mixed_arrays(
        self, num_tokens: int, num_seqs: int, is_padded: bool
    ) -> tuple[Arrays, Tensors, int]:
        """All but the block tables, on host and device, and their bytes."""
        views = self._mixed_views.get((num_tokens, num_seqs))
        if views is None:
            layout = ahead_of_tables(num_tokens, num_seqs)
            views = self._on_host(layout), self._on_device(layout), layout_bytes(layout)
            if is_padded:  # there are few of such
                self._mixed_views[num_tokens, num_seqs] = views
        return views

    def tables_on_host(self, offset: int, tables: tuple[int, int]) -> np.ndarray:
        """The block tables behind so many bytes."""
        return self._on_host({"block_tables": ("int32", tables)}, offset)["block_tables"]

    def tables_on_device(self, offset: int, tables: tuple[int, int]) -> torch.Tensor:
        return self._on_device({"block_tables": ("int32", tables)}, offset)["block_tables"]

    def _on_host(self, layout: Layout, offset: int = 0) -> Arrays:
        arrays: Arrays = {}
        for name, (dtype, shape) in layout.items():
            end = offset + array_bytes(dtype, shape)
            arrays[name] = self._host[offset:end].view(_DTYPES[dtype][0]).reshape(shape)
            offset = end
        return arrays

    def _on_device(self, layout: Layout, offset: int = 0) -> Tensors:
        tensors: Tensors = {}
        for name, (dtype, shape) in layout.items():
            end = offset + array_bytes(dtype, shape)
            tensors[name] = self.buffer[offset:end].view(_DTYPES[dtype][1]).view(shape)
            offset = end
        return tensors

    def wait(self) -> torch.Tensor:
        """The staging buffer, once the copy of the last step that was written there has read it."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.staging

    def send(self, num_bytes: int) -> None:
        """To the device, where it is another memory."""
        if self.copied is not None:
            self.buffer[:num_bytes].copy_(self.staging[:num_bytes], non_blocking=True)
            self.copied.record()


class InputBatch:
    """Staging buffers of fixed size: a step is written by C++ into one host buffer and travels in
    one copy.

    Of a step of decodes alone, the block tables travel as what has changed in them since the last
    such step: the device keeps those of all sequences that decode.

    A few tokens of a long prompt would keep few of a GPU's multiprocessors busy for long: the
    prefill kernel gives a row of tiles to each. As a row of its own each of these tokens decodes,
    and what they all attend over is a prefix that they share, which is read once and by all
    multiprocessors.

    Args:
        config: the decoder's shape.
        max_num_tokens: tokens of a step at the most.
        max_num_seqs: sequences of a step at the most.
        max_blocks_per_seq: blocks of a sequence at the most.
        block_size: tokens per block.
        device: where the tensors go.
        shares_prefixes: look for sequences that begin with the same blocks.
        spreads_chunks: let tokens of a long prompt decode; with shares_prefixes.
        num_slots: steps that may be written before the first of them is loaded.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_num_tokens: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        block_size: int,
        device: torch.device,
        shares_prefixes: bool = False,
        spreads_chunks: bool = False,
        num_slots: int = 1,
    ) -> None:
        self._config = config
        self._shares_prefixes = shares_prefixes
        self.spreads_chunks = shares_prefixes and spreads_chunks and config.windows() == (0,)
        """Whether tokens of a prompt may be rows of their own."""
        self._max_num_seqs = max_num_seqs
        self._min_saved_tokens = SHARED_PREFIX_BYTES // (4 * config.num_kv_heads * config.head_dim)
        self.block_size = block_size
        self.device = device
        self.max_blocks_per_seq = max_blocks_per_seq
        capacity = staging_bytes(max_num_tokens, max_num_seqs, max_blocks_per_seq)
        on_gpu = device.type == "cuda"
        buffer = torch.empty(capacity, dtype=torch.uint8, device=device) if on_gpu else None
        self.slots = [Slot(capacity, buffer) for _ in range(num_slots)]
        self._next_slot = 0
        tables = torch.zeros(
            (2, max_num_seqs, max_blocks_per_seq), dtype=torch.int32, device=device
        )
        self._tables, self._block_tables = tables
        """Block tables by table row; and of padded batches, whose tensors must not move."""
        self._sent = np.zeros((max_num_seqs, 2), dtype=np.int64)
        """What each table row holds: the id of a decode row, and how many of its blocks."""
        self._workspaces: dict[int, torch.Tensor] = {}
        """By the sliding windows of the layers, which need a plan each."""
        if on_gpu:
            numel = ops.paged_attention_workspace_numel(
                max_num_seqs, config.num_heads, config.head_dim
            )
            self._workspaces = {
                window: torch.empty(numel, dtype=torch.float32, device=device)
                for window in config.windows()
            }

    def prompt_rows(self, batch: Batch) -> list[AttentionRow]:
        """What is not decodes, in the order of the batch; of chunks that are spread, a row for each
        token.
        """
        rows: list[AttentionRow] = []
        others = batch.scheduled[batch.num_decodes :]
        room = self._max_num_seqs - len(batch.scheduled) if self.spreads_chunks else 0
        for scheduled in others:
            start, count = scheduled.start, scheduled.num_tokens
            if self._is_worth_spreading(start, count) and count - 1 <= room:
                room -= count - 1
                rows += (AttentionRow(scheduled, start + i, 1) for i in range(count))
            else:
                rows.append(AttentionRow(scheduled, start, count))
        return rows

    def _is_worth_spreading(self, start: int, num_tokens: int) -> bool:
        return (
            DECODE_QUERIES < num_tokens <= MAX_SPREAD_TOKENS
            and start >= MIN_SPREAD_CONTEXT + num_tokens * num_tokens // SPREAD_PAIRS
            and (num_tokens - 1) * start >= self._min_saved_tokens
        )

    def prepare(
        self,
        batch: Batch,
        padding: tuple[int, int] | None = None,
        begin: Callable[[], None] | None = None,
    ) -> ModelInput:
        """Fill the staging buffer from the batch and send it to the device; see `write` and
        `load`.
        """
        return self.load(self.write(batch, self.prompt_rows(batch), padding), begin)

    def write(
        self,
        batch: Batch,
        prompt_rows: list[AttentionRow],
        padding: tuple[int, int] | None = None,
    ) -> StagedInput:
        """Fill the staging buffer. Tokens that are not known yet, of a batch scheduled ahead, are
        0.

        Args:
            batch: what to compute.
            prompt_rows: of the batch.
            padding: tokens and rows to pad it to, with rows that have nothing to do, and, where it
                is not all decodes, tokens that belong to none. Batches of a padding have their
                tensors always in the same memory, and bounds that hold for all of them.
        """
        number = self._next_slot
        self._next_slot = (number + 1) % len(self.slots)
        self.slots[number].wait()
        if batch.decodes is None or not batch.is_decode:
            return self._write_mixed(batch, prompt_rows, padding, number)
        try:
            padded_size = None if padding is None else padding[1]
            return self._write_decodes(batch.decodes, padded_size, number)
        except BaseException:
            self._sent[:] = 0  # what the tables lack is not known
            raise

    def write_nothing(self, shape: StepShape) -> StagedInput:
        """Fill the staging buffer with a step that has nothing to do.

        Args:
            shape: what it is padded to.
        """
        number = self._next_slot
        self._next_slot = (number + 1) % len(self.slots)
        slot = self.slots[number]
        slot.wait()
        if shape.is_decode:
            host, _, num_bytes = slot.decode_arrays(shape.num_seqs, self.max_blocks_per_seq)
        else:
            host, _, num_bytes = slot.mixed_arrays(shape.num_tokens, shape.num_seqs, True)
        slot.staging[:num_bytes] = 0
        host["slot_mapping"][:] = -1
        return StagedInput(
            slot=number,
            num_bytes=num_bytes,
            is_decode=shape.is_decode,
            is_padded=True,
            num_tokens=shape.num_tokens,
            num_seqs=shape.num_seqs,
            num_tables=0,
            table_width=0,
            num_changes=0,
            num_sampled=0,
            min_query_len=0,
            max_query_len=shape.max_query_len,
            max_seq_len=self._longest,
            is_shared=shape.is_shared,
        )

    def load(self, staged: StagedInput, begin: Callable[[], None] | None = None) -> ModelInput:
        """Send what the staging buffer holds to the device.

        Args:
            staged: from `write`, here or on the rank whose bytes these are.
            begin: called where the host's part is done and the device's begins.
        """
        try:
            self._send(staged, begin)
            return self._load_decodes(staged) if staged.is_decode else self._load_mixed(staged)
        except BaseException:
            self._sent[:] = 0  # whether it has arrived is not known
            raise

    def _write_decodes(
        self, decodes: DecodeStep, padded_size: int | None, number: int
    ) -> StagedInput:
        size = padded_size or len(decodes)
        host, _, num_bytes = self.slots[number].decode_arrays(size, self.max_blocks_per_seq)
        max_seq_len = decodes.write_inputs(
            host["input_ids"],
            host["positions"],
            host["slot_mapping"],
            host["query_start_loc"],
            host["seq_lens"],
        )
        num_changes = decodes.write_table_changes(
            self.max_blocks_per_seq, self._sent, host["table_rows"], host["changes"]
        )
        host["num_changes"][0] = num_changes
        is_shared = self._shares_prefixes and decodes.find_shared_prefixes(
            self._min_saved_tokens, host["shared_prefix"]
        )
        return StagedInput(
            slot=number,
            num_bytes=num_bytes + num_changes * host["changes"].itemsize * 2,
            is_decode=True,
            is_padded=padded_size is not None,
            num_tokens=size,
            num_seqs=size,
            num_tables=0,
            table_width=0,
            num_changes=num_changes,
            num_sampled=len(decodes),
            min_query_len=0,
            max_query_len=1,
            max_seq_len=max_seq_len if padded_size is None else self._longest,
            is_shared=bool(is_shared),
        )

    def _load_decodes(self, staged: StagedInput) -> ModelInput:
        slot = self.slots[staged.slot]
        _, device, _ = slot.decode_arrays(staged.num_seqs, self.max_blocks_per_seq)
        block_tables = self._expand_tables(
            device["table_rows"],
            device["changes"][: staged.num_changes],
            staged.max_seq_len,
            staged.num_seqs if staged.is_padded else None,
        )
        return self._model_input(device, block_tables, staged)

    def _expand_tables(
        self,
        table_rows: torch.Tensor,
        changes: torch.Tensor,
        max_seq_len: int,
        padded_size: int | None,
    ) -> torch.Tensor:
        """On the device: bring its block tables up to date, and give out those of the step."""
        if len(changes):
            places, blocks = changes.unbind(1)
            self._tables.view(-1).scatter_(0, places.long(), blocks)
        if padded_size is None:
            width = -(-max_seq_len // self.block_size)
            return self._tables[:, :width].index_select(0, table_rows)
        block_tables = self._block_tables[:padded_size]
        return torch.index_select(self._tables, 0, table_rows, out=block_tables)

    def _write_mixed(
        self,
        batch: Batch,
        others: list[AttentionRow],
        padding: tuple[int, int] | None,
        number: int,
    ) -> StagedInput:
        num_tokens, num_decodes = batch.num_tokens, batch.num_decodes
        num_seqs = num_decodes + len(others)
        width = max(len(s.sequence.block_table) for s in batch.scheduled)
        padded_tokens, padded_seqs = padding or (num_tokens, num_seqs)
        slot = self.slots[number]
        host, _, num_bytes = slot.mixed_arrays(padded_tokens, padded_seqs, padding is not None)
        block_tables = slot.tables_on_host(num_bytes, (num_seqs, width))
        max_decode_len = 0
        if batch.decodes is not None:
            max_decode_len = batch.decodes.write_inputs(
                host["input_ids"][:num_decodes],
                host["positions"][:num_decodes],
                host["slot_mapping"][:num_decodes],
                host["query_start_loc"][: num_decodes + 1],
                host["seq_lens"][:num_decodes],
            )
            batch.decodes.write_tables(block_tables[:num_decodes])
        query_start_loc, seq_lens = host["query_start_loc"][: num_seqs + 1], host["seq_lens"]
        max_query_len, max_seq_len = prepare_batch(
            [row.scheduled.sequence.token_ids for row in others],
            [row.scheduled.sequence.block_table for row in others],
            [row.start for row in others],
            [row.num_tokens for row in others],
            self.block_size,
            host["input_ids"][num_decodes:num_tokens],
            host["positions"][num_decodes:num_tokens],
            host["slot_mapping"][num_decodes:num_tokens],
            query_start_loc[num_decodes:],
            seq_lens[num_decodes:num_seqs],
            block_tables[num_decodes:],
        )
        query_start_loc[num_decodes:] += num_decodes
        min_query_len = 1 if num_decodes else min(row.num_tokens for row in others)
        is_shared = self._shares_prefixes and find_shared_prefixes(
            query_start_loc,
            seq_lens[:num_seqs],
            block_tables,
            self.block_size,
            self._min_saved_tokens,
            host["shared_prefix"][:, :num_seqs],
        )
        rows = _sampling_rows(batch, others)
        host["sampled"][0, : len(rows)] = rows
        host["sampled"][1, : len(rows)] = query_start_loc[1:][rows] - 1
        if padding is not None:
            for name, value in (("input_ids", 0), ("positions", 0), ("slot_mapping", -1)):
                host[name][num_tokens:] = value
            host["query_start_loc"][num_seqs + 1 :] = num_tokens
            seq_lens[num_seqs:] = 0
            host["shared_prefix"][:, num_seqs:] = 0
        return StagedInput(
            slot=number,
            num_bytes=num_bytes + block_tables.nbytes,
            is_decode=False,
            is_padded=padding is not None,
            num_tokens=padded_tokens,
            num_seqs=padded_seqs,
            num_tables=num_seqs,
            table_width=width,
            num_changes=0,
            num_sampled=len(rows),
            min_query_len=min_query_len if padding is None else 0,
            max_query_len=_bound_of(max_query_len, padded_tokens) if padding else max_query_len,
            max_seq_len=max(max_seq_len, max_decode_len) if padding is None else self._longest,
            is_shared=bool(is_shared),
        )

    def _load_mixed(self, staged: StagedInput) -> ModelInput:
        num_tables, width = staged.num_tables, staged.table_width
        slot = self.slots[staged.slot]
        _, device, offset = slot.mixed_arrays(staged.num_tokens, staged.num_seqs, staged.is_padded)
        block_tables = slot.tables_on_device(offset, (num_tables, width))
        if staged.is_padded:
            self._block_tables[:num_tables, :width] = block_tables
            block_tables = self._block_tables[: staged.num_seqs]
        return self._model_input(device, block_tables, staged)

    @property
    def _longest(self) -> int:
        """A bound of all sequences."""
        return self.max_blocks_per_seq * self.block_size

    def _send(self, staged: StagedInput, begin: Callable[[], None] | None) -> None:
        if begin is not None:
            begin()
        self.slots[staged.slot].send(staged.num_bytes)

    def _model_input(
        self, device: Tensors, block_tables: torch.Tensor, staged: StagedInput
    ) -> ModelInput:
        """What has been sent."""
        sampled = None if staged.is_decode else device["sampled"][:, : staged.num_sampled]
        return ModelInput(
            device["input_ids"],
            device["positions"],
            AttentionMetadata(
                device["slot_mapping"],
                block_tables,
                device["query_start_loc"],
                device["seq_lens"],
                staged.min_query_len,
                staged.max_query_len,
                staged.max_seq_len,
                self._workspaces,
                device["shared_prefix"] if staged.is_shared else None,
            ),
            sampled,
        )

    def last_tokens(self, attention: AttentionMetadata) -> LastTokens:
        """Of each sequence of a step; on the device. Padding stands for one without a meaning."""
        starts = attention.query_start_loc
        alone = AttentionMetadata(
            attention.slot_mapping,
            attention.block_tables,
            torch.arange(len(starts), dtype=starts.dtype, device=starts.device),
            attention.seq_lens.clamp(min=1),
            min_query_len=1,
            max_query_len=1,
            max_seq_len=attention.max_seq_len,
            workspaces=attention.workspaces,
            is_planned=False,
        )
        return LastTokens((starts[1:] - 1).clamp_(min=0).long(), alone)

    def plan(self, attention: AttentionMetadata) -> None:
        """Share out the attention's work; ahead of the layers, on the device."""
        for window, workspace in self._workspaces.items():
            ops.plan_attention(
                workspace,
                attention.query_start_loc,
                attention.seq_lens,
                num_heads=self._config.num_heads,
                num_kv_heads=self._config.num_kv_heads,
                head_dim=self._config.head_dim,
                min_query_len=attention.min_query_len,
                max_query_len=attention.max_query_len,
                sliding_window=window,
                shared_prefix=attention.shared_prefix,
            )


def _sampling_rows(batch: Batch, others: list[AttentionRow]) -> list[int]:
    """Those with the last token of each sequence that samples."""
    rows = list(range(batch.num_decodes))
    for place, row in enumerate(others, batch.num_decodes):
        scheduled = row.scheduled
        if (
            scheduled.samples
            and row.start + row.num_tokens == scheduled.start + scheduled.num_tokens
        ):
            rows.append(place)
    return rows


def _bound_of(max_query_len: int, num_tokens: int) -> int:
    """The query lengths that a padded step stands for."""
    return next(bound for bound in (1, DECODE_QUERIES, num_tokens) if max_query_len <= bound)
