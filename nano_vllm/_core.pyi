"""The block allocator and the batch preparation, in C++ (csrc/cache, bound in csrc/bindings)."""

from collections.abc import Sequence
from typing import ClassVar

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
    def allocate(self) -> int:
        """A block with one reference: a Free one, else the least recently used Cached one.

        Raises:
            OutOfBlocks: every block is held.
        """
    def allocate_many(self, count: int) -> list[int]:
        """That many blocks.

        Raises:
            OutOfBlocks: there are not so many; none is taken.
        """
    def share(self, block: int) -> None:
        """Add a reference to a held block."""
    def free(self, block: int) -> None:
        """Take a reference away; without any, a block in the index is Cached, another Free."""
    def free_many(self, blocks: list[int]) -> None:
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
    def lookup(self, parent: bytes, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> int:
        """The block of this content with one reference added, or -1.

        Tokens and parent are compared as well as the hash: a collision is a miss.
        """
    def check_integrity(self) -> None:
        """Verify the invariants that csrc/cache/block_allocator.h lists; for tests.

        Raises:
            RuntimeError: names what is broken.
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
