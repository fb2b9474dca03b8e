"""Which KV blocks each sequence has: block tables over the C++ allocator."""

from __future__ import annotations

from nano_vllm._core import BlockAllocator
from nano_vllm.sequence import Sequence


class BlockManager:
    """Gives sequences their blocks and takes them back; blocks of equal content are shared.

    A block is shared in two ways. A prefix hit is a full block found by its content; nobody writes
    into it any more. A fork takes all the blocks of a sibling's prompt, the last of which may be
    partly filled: whoever is about to write into it gets a copy first.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens per block.
        enable_prefix_caching: find full blocks by their content.
        hash_key: secret of the content hashes, in [0, 2^64).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_key: int = 0,
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, hash_key)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    @property
    def num_blocks(self) -> int:
        return self.allocator.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.allocator.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def share_prefix(self, sequence: Sequence, sibling: Sequence | None = None) -> None:
        """Give a sequence without blocks those that already hold its first tokens.

        At least its last token stays to be computed, as somebody wants its logits.

        Args:
            sequence: gets block_table, block_hashes and num_computed_tokens.
            sibling: a sequence that begins with the same tokens and holds them all computed.
        """
        if sibling is not None:
            self._fork(sibling, sequence)
        elif self.enable_prefix_caching:
            self._find_prefix(sequence)

    def can_allocate(self, sequence: Sequence, reserve: int = 0) -> bool:
        """Whether `allocate` has blocks enough and leaves `reserve` free ones."""
        missing = self.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        return missing + self._must_copy(sequence) + reserve <= self.allocator.num_free

    def allocate(self, sequence: Sequence, copies: list[tuple[int, int]]) -> None:
        """Cover all tokens of the sequence with blocks; `can_allocate` says whether that works.

        Args:
            sequence: behind `share_prefix`.
            copies: gets the copies (source block, destination block) to make before the step.
        """
        table = sequence.block_table
        if self._must_copy(sequence):
            source = table[-1]
            table[-1] = self.allocator.make_writable(source)
            if table[-1] != source:
                copies.append((source, table[-1]))
        missing = self.num_blocks_for(sequence.num_tokens) - len(table)
        table += self.allocator.allocate_many(missing)

    def commit(self, sequence: Sequence) -> None:
        """Let others find the full blocks whose tokens have all been computed."""
        if self.enable_prefix_caching:
            self.allocator.commit_blocks(
                sequence.block_table,
                sequence.block_hashes,
                sequence.token_ids,
                sequence.num_computed_tokens,
            )

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's blocks away; nothing of it counts as computed any more."""
        self.allocator.free_many(sequence.block_table)
        sequence.block_table = []
        sequence.block_hashes = []
        sequence.num_computed_tokens = 0

    def discard(self, sequence: Sequence) -> None:
        """Free blocks whose content is not to be trusted: nobody shall find them again."""
        for block in sequence.block_table:
            if self.allocator.ref_count(block) == 1:
                self.allocator.make_writable(block)
        self.free(sequence)

    def _find_prefix(self, sequence: Sequence) -> None:
        size = self.block_size
        parent = b""
        for index in range((sequence.num_tokens - 1) // size):
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            block = self.allocator.lookup(parent, tokens)
            if block < 0:
                break
            parent = self.allocator.hash_block(parent, tokens)
            sequence.block_table.append(block)
            sequence.block_hashes.append(parent)
        sequence.num_computed_tokens = len(sequence.block_table) * size

    def _fork(self, sibling: Sequence, sequence: Sequence) -> None:
        num_shared = sequence.num_tokens - 1
        blocks = sibling.block_table[: self.num_blocks_for(num_shared)]
        for block in blocks:
            self.allocator.share(block)
        sequence.block_table = blocks
        sequence.block_hashes = sibling.block_hashes[: num_shared // self.block_size]
        sequence.num_computed_tokens = num_shared

    def _must_copy(self, sequence: Sequence) -> bool:
        """Whether the next token goes into a block that came by a fork."""
        return sequence.num_computed_tokens < len(sequence.block_table) * self.block_size
