"""The sequences that have blocks."""

from __future__ import annotations

from collections.abc import Iterator

from nano_vllm._core import DecodeRows
from nano_vllm.batch import Batch, ScheduledSequence
from nano_vllm.cache.block_manager import BlockManager
from nano_vllm.sequence import Sequence, SequenceStatus


class RunningSequences:
    """Those that run, in the order of their admission.

    Those that decode are rows in C++, which a step walks over, takes blocks for and appends tokens
    to without Python. All others prefill: prompts, and beams, whose next token depends on all beams
    of their request.

    A step may be scheduled behind one that is still computed. So a sequence is a row from the step
    on that computes the end of its prompt: the step behind it computes the token that comes of it.

    Invariants between steps: the rows are the sequences that are not prefilling; those that do have
        blocks for all of their tokens, but for beams, of which a new token may need one; no block
        of a row that is not full is shared.

    Args:
        block_manager: where the rows' blocks come from.
        max_num_seqs: sequences at the same time.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int) -> None:
        self.rows = DecodeRows(block_manager.allocator, max_num_seqs, block_manager.sliding_window)
        self.prefilling: dict[Sequence, None] = {}
        """Those that are no rows."""
        self.joining: set[Sequence] = set()
        """Rows whose prompts are computed in a step that is not taken in yet."""
        self.num_streams = 0
        """Rows that are streamed."""
        self.max_num_seqs = max_num_seqs
        self._all: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._all)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._all

    @property
    def is_full(self) -> bool:
        return len(self._all) >= self.max_num_seqs

    @property
    def num_table_blocks(self) -> int:
        """Blocks that all hold together."""
        return self.rows.num_blocks + sum(len(s.held_blocks) for s in self.prefilling)

    def start(self, sequence: Sequence) -> None:
        """Take in a sequence that has blocks for all of its tokens."""
        self._all[sequence] = self.prefilling[sequence] = None
        sequence.status = SequenceStatus.PREFILL

    def join(self, sequence: Sequence, batch: Batch) -> None:
        """Make a row of a sequence whose known tokens are all computed with the batch."""
        del self.prefilling[sequence]
        self.joining.add(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.num_streams += sequence.is_streamed
        sequence.decode_row = self.rows.add(
            ScheduledSequence(sequence, 1, True),
            sequence.token_ids,
            sequence.block_table,
            sequence.block_hashes,
            sequence.max_num_tokens,
            sequence.num_prompt_tokens + sequence.params.min_tokens,
            sequence.end_token_ids,
            sequence.is_followed,
            sequence.cache_root,
            sequence.num_freed_blocks,
        )
        assert batch.decodes is not None
        batch.decodes.join(sequence.decode_row)

    def take_first(self, sequence: Sequence, token_id: int) -> None:
        """Append to a row that joined a step the token that came of it."""
        self.joining.remove(sequence)
        self.rows.take(sequence.decode_row, token_id)

    def remove(self, sequence: Sequence) -> None:
        """Let go of a sequence, which keeps its blocks."""
        del self._all[sequence]
        if sequence in self.prefilling:
            del self.prefilling[sequence]
        else:
            self.joining.discard(sequence)
            self.rows.remove(sequence.decode_row)
            self.num_streams -= sequence.is_streamed
            sequence.num_computed_tokens = sequence.num_tokens - 1
            sequence.decode_row = -1
        sequence.status = SequenceStatus.WAITING

    def peak_growth(self, horizon: int) -> int:
        """The most blocks that all will have taken beyond what those have given back that reach
        their length, at any of so many next steps.
        """
        return self.rows.peak_growth(
            horizon,
            [
                (s.num_tokens, s.max_num_tokens, len(s.block_table), s.num_freed_blocks)
                for s in self.prefilling
            ],
        )
