"""The block allocator, the sequences that decode and the batch preparation, in C++ (csrc/cache,
bound in csrc/bindings).
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

class OutOfBlocks(RuntimeError):
    """No block is left to allocate. Nothing has changed."""

class BlockState:
    """What a block is; compare with `==`."""

    FREE: ClassVar[BlockState]
    """Nobody holds it and its content means nothing."""
    ACTIVE: ClassVar[BlockState]
    """It is held."""
    CACHED: ClassVar[BlockState]
    """Nobody holds it, but `lookup` finds it by its content."""
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __int__(self) -> int: ...

class BlockOwner:
    """What a reference to a block is for. References are counted by it."""

    SEQUENCE: ClassVar[BlockOwner]
    """A block table."""
    PIN: ClassVar[BlockOwner]
    """Content that shall not be evicted."""
    TRANSFER: ClassVar[BlockOwner]
    """A copy under way."""
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __int__(self) -> int: ...

class BlockAllocator:
    """A fixed pool of KV blocks, numbered from 0: reference counts, content hashes, LRU reuse.

    It manages numbers alone; the keys and values live elsewhere. Every operation takes constant
    time for each block it names. A block that is out of range, or that nobody holds where a held
    one is needed, raises ValueError and leaves the pool as it was. Not thread-safe.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens per block.
        hash_key: secret of the content hashes, in [0, 2^64).
    """

    def __init__(self, num_blocks: int, block_size: int, hash_key: int = 0) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_free(self) -> int:
        """Free and Cached blocks: what can be allocated."""
    @property
    def num_cached(self) -> int: ...
    @property
    def num_active(self) -> int: ...
    def num_references(self, owner: BlockOwner) -> int:
        """References to all blocks together."""
    def allocate(self, owner: BlockOwner = ...) -> int:
        """A block with one reference: a Free one, else the least recently used Cached one.

        Raises:
            OutOfBlocks: every block is held.
        """
    def allocate_many(self, count: int, owner: BlockOwner = ...) -> list[int]:
        """That many blocks.

        Raises:
            OutOfBlocks: there are not so many; none is taken.
        """
    def share(self, block: int, owner: BlockOwner = ...) -> None:
        """Add a reference to a held block."""
    def free(self, block: int, owner: BlockOwner = ...) -> None:
        """Take a reference away; without any, a block in the index is Cached, another Free.

        ValueError if the owner has no references at all.
        """
    def free_many(self, blocks: list[int], owner: BlockOwner = ...) -> None:
        """Take a reference away for each mention, of all blocks or, if it raises, of none.

        Args:
            blocks: in the order of a sequence; its tail is released first, hence evicted first, as
                it cannot be found without its head.
        """
    def ref_count(self, block: int) -> int: ...
    def state(self, block: int) -> BlockState: ...
    def make_writable(self, block: int) -> int:
        """A block that its one holder may write into (copy-on-write).

        Returns:
            the same block, no longer in the index, if the caller alone holds it; else a new one, to
            which the caller's reference has moved and the caller copies the content.

        Raises:
            OutOfBlocks: a new block is needed and every block is held.
            ValueError: sequences have no references at all.
        """
    def hash_block(
        self, parent: bytes, token_ids: Sequence[int] | npt.NDArray[np.integer]
    ) -> bytes:
        """The content hash of a full block: SipHash-2-4 with 128-bit output, under `hash_key`.

        Args:
            parent: hash of the block before; b"" before a sequence's first block.
            token_ids: block_size tokens, each in [0, 2^31).

        Returns:
            16 bytes.
        """
    def commit(
        self, block: int, parent: bytes, token_ids: Sequence[int] | npt.NDArray[np.integer]
    ) -> bytes:
        """Say what a held, full block contains, so that `lookup` finds it.

        Where an equal block is in the index already, that one stays and this one is not indexed.
        A block in the index must not be written into: see `make_writable`.

        Args:
            block: a held block.
            parent: hash of the block before; b"" before a sequence's first block.
            token_ids: block_size tokens, each in [0, 2^31).

        Returns:
            the hash of its content.

        Raises:
            ValueError: the block is in the index with other content.
        """
    def commit_blocks(
        self,
        block_table: list[int],
        block_hashes: list[bytes],
        token_ids: list[int],
        num_computed: int,
        root: bytes = ...,
    ) -> None:
        """`commit` the full blocks of a sequence that are not committed yet.

        Args:
            block_table: its blocks.
            block_hashes: of the leading blocks, which are committed; gets those of the others.
            token_ids: its tokens.
            num_computed: tokens that the cache holds.
            root: stands in place of the hash before the first block: b"" or 16 bytes.

        Raises:
            ValueError: as `commit`.
            IndexError: a list is too short.
        """
    def lookup(
        self,
        parent: bytes,
        token_ids: Sequence[int] | npt.NDArray[np.integer],
        owner: BlockOwner = ...,
    ) -> int:
        """The block of this content with one reference added, or -1.

        Tokens and parent are compared as well as the hash: a collision is a miss.
        """
    def lookup_blocks(
        self, token_ids: list[int], first: int, parent: bytes, owner: BlockOwner = ...
    ) -> tuple[list[int], list[bytes]]:
        """`lookup` the full blocks of a sequence, up to the first that is not there.

        Args:
            token_ids: its tokens.
            first: block to begin with.
            parent: hash of the block before that one, or the sequence's root.

        Returns:
            blocks, with one reference added to each, and their hashes.
        """
    def forget(self, block: int) -> None:
        """Take a block out of the index, whoever holds it: its content is not what `commit` was
        told.
        """
    def set_next_tier(self, tier: BlockAllocator | None) -> None:
        """Where evicted content goes: a pool of slower memory, of the same block size and hash key.

        What is evicted here is Cached there from then on, unless it is there already, and
        `take_evictions` says what to copy. Where all blocks there are held, the content is lost.
        """
    def take_evictions(self) -> list[tuple[int, int]]:
        """Since the last call: blocks, and those of the next tier that get their content, in the
        order in which to copy; before anything is written into the blocks.
        """
    def check_integrity(self) -> None:
        """Verify the invariants that csrc/cache/block_allocator.h lists; for tests.

        Raises:
            RuntimeError: names what is broken.
        """

class DecodeStep:
    """One token of each of some rows, as a step computes it. Made by `DecodeRows`.

    It is to be written before the next step is taken in: once a row of it is gone, writing raises
    ValueError. So do arrays of another dtype, shape or layout, and what does not fit them.
    """

    @property
    def scheduled(self) -> list[Any]:
        """The rows' `scheduled`: the same list as that of the step before, if they are the same
        rows. Not to be changed.
        """
    @property
    def num_missing(self) -> int:
        """Rows that the step could have held but for the blocks they lack."""
    @property
    def ahead_rows(self) -> list[int]:
        """Of a step scheduled ahead: for each row, its place in the step before."""
    def join(self, row_id: int) -> None:
        """A row that was just added, with blocks for all of its tokens: the step computes the last
        of these, by other means than as one of its rows. In the step ahead of this one it has its
        place behind them, in the order of joining.
        """
    def __len__(self) -> int: ...
    def write_inputs(
        self,
        out_input_ids: npt.NDArray[np.int64],
        out_positions: npt.NDArray[np.int64],
        out_slot_mapping: npt.NDArray[np.int64],
        out_query_start_loc: npt.NDArray[np.int32],
        out_seq_lens: npt.NDArray[np.int32],
    ) -> int:
        """Write what `prepare_batch` writes, padded with sequences that have nothing to do.

        Args:
            out_input_ids: [padded_size]; 0 where the token is not known yet.
            out_positions: [padded_size].
            out_slot_mapping: [padded_size]; -1 in the padding.
            out_query_start_loc: [padded_size + 1].
            out_seq_lens: [padded_size]; 0 in the padding.

        Returns:
            the greatest seq_len.
        """
    def write_tables(self, out: npt.NDArray[np.int32]) -> None:
        """Write the block tables as `prepare_batch` does: [len(self), max_blocks_per_seq]."""
    def write_table_changes(
        self,
        max_blocks_per_seq: int,
        sent: npt.NDArray[np.int64],
        out_table_rows: npt.NDArray[np.int32],
        out_changes: npt.NDArray[np.int32],
    ) -> int:
        """Write what a copy of the block tables, [max_rows, max_blocks_per_seq], needs to hold
        those of the step.

        Args:
            max_blocks_per_seq: columns of the copy.
            sent: [max_rows, 2]; what the copy holds: zeros if nothing. Brought up to date.
            out_table_rows: [padded_size]; the rows of the copy that are the step's, 0 in the
                padding.
            out_changes: [at most, 2]; places, row * max_blocks_per_seq + column, and the blocks
                that belong there. No place comes twice.

        Returns:
            how many changes there are.
        """
    def find_shared_prefixes(self, min_saved_tokens: int, out: npt.NDArray[np.int32]) -> int:
        """As `find_shared_prefixes`, for the step.

        Args:
            min_saved_tokens: if fewer need not be read, nothing is shared.
            out: [2, padded_size]; of no use where nothing is shared.
        """

class DecodeRows:
    """The sequences that decode: a row of numbers each, so that a step takes one call for all.

    All tokens of such a sequence but the last have been computed, or the step that computes them
    all has been scheduled, and from the last one's slot on its blocks are its own. Its lists grow
    in place; nobody else changes them while it is here. Steps are taken in by `advance` in the
    order in which they were scheduled. Rows may go at any time: what comes of them in a step under
    way is dropped. Not thread-safe.

    Args:
        allocator: where blocks come from.
        max_rows: rows at the same time.
        sliding_window: tokens that a query sees in any layer, itself included; 0 for all. A row
            that takes a block gives back those behind the window: they stay in its table, where
            nobody reads them, and `scheduled.sequence.num_freed_blocks` says how many they are.
    """

    def __init__(
        self, allocator: BlockAllocator, max_rows: int, sliding_window: int = 0
    ) -> None: ...
    def __len__(self) -> int: ...
    @property
    def num_blocks(self) -> int:
        """That the rows hold."""
    def peak_growth(self, horizon: int, others: list[tuple[int, int, int, int]]) -> int:
        """The most blocks that the rows will have taken beyond what they have given back, at
        max_num_tokens and behind the sliding window, at any of the next steps. Blocks that a row
        shared with others when it was added are not given back.

        Args:
            horizon: steps to look ahead.
            others: sequences that are no rows yet, but take part: num_tokens, max_num_tokens,
                number of blocks and how many of these are freed, of each.
        """
    def add(
        self,
        scheduled: Any,
        token_ids: list[int],
        block_table: list[int],
        block_hashes: list[bytes],
        max_num_tokens: int,
        min_num_tokens: int,
        end_token_ids: Iterable[int],
        is_followed: bool,
        root: bytes = ...,
        num_freed_blocks: int = 0,
    ) -> int:
        """A row behind all others.

        Args:
            scheduled: what the steps' `scheduled` name it by.
            token_ids: one at least.
            block_table: covers all tokens but the last.
            block_hashes: of its leading blocks, as far as they are committed.
            max_num_tokens: the sequence ends with so many tokens.
            min_num_tokens: an end token counts only beyond so many.
            end_token_ids: tokens that end the sequence.
            is_followed: whether `advance` is to name it for each of its tokens.
            root: as in `commit_blocks`.
            num_freed_blocks: leading blocks behind the sliding window that are not its own.

        Returns:
            its id, above those of all rows before.

        Raises:
            ValueError: all rows are taken; lists too short.
        """
    def remove(self, row_id: int) -> None:
        """The row's blocks stay as they are. ValueError if there is no such row."""
    def schedule(self, max_rows: int, under_way: list[DecodeStep] = ...) -> DecodeStep:
        """The step of the oldest rows, max_rows at most, up to the first that has no slot for its
        last token and gets no block for it.

        Args:
            max_rows: what the step may hold.
            under_way: steps that are not taken in yet; rows of theirs, and that joined them, are
                left out.
        """
    def schedule_ahead(self, behind: DecodeStep, max_rows: int) -> DecodeStep | None:
        """The step behind one whose tokens are not known yet, of all rows but those that reach
        max_num_tokens in it.

        Returns:
            None, and no block is taken, where a row neither is part of that step nor joined it,
            blocks do not suffice, or more than max_rows stay.
        """
    def take(self, row_id: int, token_id: int) -> None:
        """Append to a row that joined a step the token that came of it. ValueError if there is no
        such row, and for a token id below 0 or above 2^31.
        """
    def advance(self, step: DecodeStep, token_ids: list[int], commits: bool) -> list[int]:
        """Append a step's tokens to their sequences.

        Args:
            step: scheduled before.
            token_ids: one for each row of the step, and any others behind; below 0 for a row that
                failed, which is left as it is.
            commits: whether to commit the blocks that are full.

        Returns:
            places in the step of the rows that ended, failed or are followed.
        """

def prepare_batch(
    token_ids: list[list[int]],
    block_tables: list[list[int]],
    num_computed: list[int],
    num_tokens: list[int],
    block_size: int,
    out_input_ids: npt.NDArray[np.int64],
    out_positions: npt.NDArray[np.int64],
    out_slot_mapping: npt.NDArray[np.int64],
    out_query_start_loc: npt.NDArray[np.int32],
    out_seq_lens: npt.NDArray[np.int32],
    out_block_tables: npt.NDArray[np.int32],
) -> tuple[int, int]:
    """Write a step's integer inputs straight into the caller's arrays.

    Sequence `s` advances by `num_tokens[s]` tokens from token `num_computed[s]` on; the batch holds
    the sequences' tokens one after the other. Only those tokens of a list are read.

    Args:
        token_ids: all tokens of each sequence.
        block_tables: the blocks of each sequence; they cover the scheduled tokens.
        num_computed: tokens of each sequence that the cache holds.
        num_tokens: tokens of each sequence that the step computes.
        block_size: tokens per block.
        out_input_ids: [sum of num_tokens].
        out_positions: [sum of num_tokens]; places in the sequence.
        out_slot_mapping: [sum of num_tokens]; block * block_size + row in the block.
        out_query_start_loc: [num_seqs + 1]; where each sequence's tokens begin in the batch.
        out_seq_lens: [num_seqs]; num_computed + num_tokens.
        out_block_tables: [num_seqs, max_blocks_per_seq], rows at any stride; 0 past a sequence's
            blocks.

    Returns:
        the greatest number of tokens that a sequence advances by, and the greatest seq_len.

    Raises:
        ValueError: an array of another dtype, shape or layout, a count or number out of range,
            tokens that a sequence does not have, a block table too short or too wide. The arrays
            then hold nothing of use.
    """

def find_shared_prefixes(
    query_start_loc: npt.NDArray[np.int32],
    seq_lens: npt.NDArray[np.int32],
    block_tables: npt.NDArray[np.int32],
    block_size: int,
    min_saved_tokens: int,
    out: npt.NDArray[np.int32],
) -> int:
    """Find the sequences of a step that begin with the same blocks, of those with one query token.

    Args:
        query_start_loc: [num_seqs + 1], as `prepare_batch` writes it.
        seq_lens: [num_seqs], likewise.
        block_tables: [num_seqs, max_blocks_per_seq], likewise.
        block_size: tokens per block.
        min_saved_tokens: if fewer need not be read, nothing is shared.
        out: [2, num_seqs]; written, the `shared_prefix` of `ops.paged_attention`.

    Returns:
        tokens that need not be read; 0 if nothing is shared.

    Raises:
        ValueError: an array of another dtype, shape or layout, or a block table that is too short.
    """

def first_not_a_token(token_ids: Sequence[object], vocab_size: int) -> int:
    """Where the first thing stands that is no int in [0, vocab_size); -1 if there is none. True is
    no token id, nor is what is of a class derived from int.
    """
