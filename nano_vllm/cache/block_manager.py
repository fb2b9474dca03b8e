"""Which KV blocks each sequence has: block tables over the C++ allocator."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

from nano_vllm._core import BlockAllocator, BlockOwner
from nano_vllm.batch import Batch
from nano_vllm.cache import ledger
from nano_vllm.cache.ledger import Leak
from nano_vllm.sequence import Sequence


class BlockManager:
    """Gives sequences their blocks and takes them back; blocks of equal content are shared.

    A block is shared in two ways. A prefix hit is a full block found by its content; nobody writes
    into it any more. A fork takes all the blocks of another sequence, the last of which may be
    partly filled: whoever is about to write into it gets a copy first.

    A block can be found as soon as the step that computes it is scheduled: whoever finds it reads
    it behind that step, or in it, as every layer writes the keys and values of all tokens before it
    reads any.

    With blocks in host memory, what is evicted is copied there, and copied back where that is
    quicker than to compute it again. A preempted sequence comes back in this way too.

    Args:
        num_blocks: blocks of the pool.
        block_size: tokens per block.
        enable_prefix_caching: find full blocks by their content.
        hash_key: secret of the content hashes, in [0, 2^64).
        num_host_blocks: blocks in host memory.
        sliding_window: tokens that a query sees in any layer, itself included; 0 for all. Blocks
            behind it are given back, and are found as long as nobody has taken them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_key: int = 0,
        num_host_blocks: int = 0,
        sliding_window: int = 0,
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, hash_key)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_host_blocks = num_host_blocks
        self.sliding_window = sliding_window
        self._hash_key = hash_key
        self.host_allocator: BlockAllocator | None = None
        if num_host_blocks and enable_prefix_caching:
            self.host_allocator = BlockAllocator(num_host_blocks, block_size, hash_key)
            self.allocator.set_next_tier(self.host_allocator)
        self._found_on_host: dict[Sequence, list[int]] = {}
        """Host blocks that `share_prefix` found, held until `allocate` or `free`."""
        self._pins: dict[int, list[int]] = {}
        self._next_pin = 0
        self._num_pinned = 0
        self.num_loaded_tokens = 0
        """Copied back from host memory so far."""

    @property
    def num_blocks(self) -> int:
        return self.allocator.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.allocator.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def cache_root(self, salt: str | None) -> bytes:
        """What stands before the first block of a prompt in its hash: tenants of different salts
        share nothing, and cannot tell what others have asked.
        """
        if salt is None:
            return b""
        key = self._hash_key.to_bytes(8, "little")
        return hashlib.blake2b(salt.encode(), digest_size=16, key=key).digest()

    def share_prefix(
        self,
        sequence: Sequence,
        sibling: Sequence | None = None,
        may_load: Callable[[int, int], bool] = lambda num_blocks, num_before: True,
    ) -> None:
        """Give a sequence without blocks those that already hold its first tokens.

        At least its last token stays to be computed, as somebody wants its logits.

        Args:
            sequence: gets block_table, block_hashes and num_computed_tokens.
            sibling: a sequence that begins with the same tokens and holds them all computed.
            may_load: whether to copy so many blocks back from host memory, behind so many found.
        """
        num_tokens = sequence.num_tokens - 1
        if sibling is not None and sibling.num_freed_blocks <= self._num_behind(num_tokens):
            self.fork(sibling, sequence, num_tokens)
        elif self.enable_prefix_caching:
            self._find_prefix(sequence, may_load)

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Give a sequence without blocks those of the parent's first tokens, which are computed,
        and none of which is freed that the child's next token sees.
        """
        blocks = parent.block_table[: self.num_blocks_for(num_tokens)]
        for block in blocks[parent.num_freed_blocks :]:
            self.allocator.share(block)
        child.block_table = blocks
        child.num_freed_blocks = parent.num_freed_blocks
        child.block_hashes = parent.block_hashes[: num_tokens // self.block_size]
        child.num_computed_tokens = num_tokens

    def num_missing_blocks(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that `allocate` takes from the pool for all of them together."""
        count = 0
        written: Counter[int] = Counter()
        for sequence in sequences:
            table = sequence.block_table
            count += self.num_blocks_for(sequence.num_tokens) - len(table)
            if self._writes_into_last(sequence):
                written[table[-1]] += 1
        # The last one to write into a block that nobody else has keeps it.
        for block, writers in written.items():
            count += writers - (self.allocator.ref_count(block) == writers)
        return count

    def allocate(self, sequence: Sequence, batch: Batch) -> None:
        """Cover all tokens of the sequence with blocks; see `num_missing_blocks`.

        Args:
            sequence: behind `share_prefix` or `fork`.
            batch: gets the copies to make before its step.
        """
        table = sequence.block_table
        if self._writes_into_last(sequence):
            source = table[-1]
            table[-1] = self.allocator.make_writable(source)
            if table[-1] != source:
                batch.block_copies.append((source, table[-1]))
        missing = self.num_blocks_for(sequence.num_tokens) - len(table)
        table += self.allocator.allocate_many(missing)
        if sequence in self._found_on_host:
            self._load(sequence, self._found_on_host.pop(sequence), batch)

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the full blocks of the first tokens, which are computed or scheduled."""
        if self.enable_prefix_caching:
            self.allocator.commit_blocks(
                sequence.block_table,
                sequence.block_hashes,
                sequence.token_ids,
                num_tokens,
                sequence.cache_root,
            )

    def free_behind_window(self, sequence: Sequence) -> None:
        """Take away the blocks that no token sees which is still to be computed."""
        num_behind = self._num_behind(sequence.num_computed_tokens)
        if num_behind > sequence.num_freed_blocks:
            self.allocator.free_many(sequence.block_table[sequence.num_freed_blocks : num_behind])
            sequence.num_freed_blocks = num_behind

    def take_evictions(self, batch: Batch) -> None:
        """What scheduling the batch has evicted, for it to copy to host memory."""
        if self.host_allocator is not None:
            batch.swap_outs = self.allocator.take_evictions()
            # Held until now, so that no eviction took their place before they are copied back.
            for block, _ in batch.swap_ins:
                self.host_allocator.free(block, BlockOwner.TRANSFER)

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's blocks away; nothing of it counts as computed any more."""
        self.allocator.free_many(sequence.held_blocks)
        for block in self._found_on_host.pop(sequence, ()):
            self._host.free(block, BlockOwner.TRANSFER)
        sequence.block_table = []
        sequence.num_freed_blocks = 0
        sequence.block_hashes = []
        sequence.num_computed_tokens = 0

    def distrust(self, sequence: Sequence) -> None:
        """Have nobody find the blocks that a sequence alone has: what they hold is broken."""
        for block in sequence.held_blocks:
            if self.allocator.ref_count(block) == 1:
                self.allocator.forget(block)

    def forget_written(self, batch: Batch) -> None:
        """Have nobody find what a step was to write that failed, whoever holds it by now: its
        sequences may have ended meanwhile, or given blocks back that are behind their window.
        """
        for _, block in batch.swap_outs:
            self._host.forget(block)
        written = [block for _, block in batch.swap_ins]
        for scheduled in batch.scheduled[batch.num_decodes :]:
            end = self.num_blocks_for(scheduled.start + scheduled.num_tokens)
            written += scheduled.block_table[scheduled.start // self.block_size : end]
        for block in written:
            self.allocator.forget(block)

    def pin(self, token_ids: list[int], root: bytes, spare: int) -> int:
        """Keep the blocks that hold the first tokens, as far as there are any, from eviction.

        Args:
            token_ids: whose blocks are looked for.
            root: their cache_root.
            spare: blocks that no pin may take.

        Returns:
            a number for `unpin`. ValueError where fewer than `spare` blocks would be left.
        """
        blocks, _ = self.allocator.lookup_blocks(token_ids, 0, root, BlockOwner.PIN)
        pinned = {block for pin in self._pins.values() for block in pin} | set(blocks)
        if self.num_blocks - len(pinned) < spare:
            self.allocator.free_many(blocks, BlockOwner.PIN)
            raise ValueError(
                f"{len(pinned)} pinned blocks of {self.num_blocks} would leave fewer than the "
                f"{spare} that a sequence may need"
            )
        self._next_pin += 1
        self._pins[self._next_pin] = blocks
        self._num_pinned += len(blocks)
        return self._next_pin

    def unpin(self, pin: int) -> None:
        """Leave a pin's blocks to eviction again."""
        blocks = self._pins.pop(pin)
        self._num_pinned -= len(blocks)
        self.allocator.free_many(blocks, BlockOwner.PIN)

    @property
    def pins(self) -> dict[int, list[int]]:
        """Blocks of each pin."""
        return {pin: list(blocks) for pin, blocks in self._pins.items()}

    def is_balanced(self, num_table_blocks: int) -> bool:
        """Whether every reference has its owner, in constant time; while no step is scheduled.

        Args:
            num_table_blocks: that all sequences hold.
        """
        return ledger.is_balanced(self.allocator, num_table_blocks, self._num_pinned) and (
            self.host_allocator is None or ledger.is_balanced(self.host_allocator)
        )

    def reclaim(self, sequences: Iterable[Sequence]) -> list[Leak]:
        """Take references back that none of these sequences and no pin has; in host memory all, as
        between steps nothing is held there.

        Raises:
            RuntimeError: a block has fewer references than owners.
        """
        in_tables = Counter(b for s in sequences for b in s.held_blocks)
        pinned = Counter(b for pin in self._pins.values() for b in pin)
        leaks = ledger.take_back(self.allocator, in_tables, pinned)
        if self.host_allocator is not None:
            leaks += ledger.take_back(self.host_allocator, Counter(), Counter(), is_on_host=True)
            self._found_on_host.clear()
        return leaks

    @property
    def _host(self) -> BlockAllocator:
        assert self.host_allocator is not None
        return self.host_allocator

    def _find_prefix(self, sequence: Sequence, may_load: Callable[[int, int], bool]) -> None:
        tokens, root = sequence.token_ids[:-1], sequence.cache_root
        blocks, hashes = self.allocator.lookup_blocks(tokens, 0, root)
        sequence.block_table, sequence.block_hashes = blocks, hashes
        num_found = len(blocks)
        if self.host_allocator is not None:
            parent = hashes[-1] if hashes else root
            on_host, _ = self.host_allocator.lookup_blocks(
                tokens, num_found, parent, BlockOwner.TRANSFER
            )
            if not on_host or not may_load(len(on_host), num_found):
                self.host_allocator.free_many(on_host, BlockOwner.TRANSFER)
            else:
                self._found_on_host[sequence] = on_host
                num_found += len(on_host)
        sequence.num_computed_tokens = num_found * self.block_size

    def _load(self, sequence: Sequence, on_host: list[int], batch: Batch) -> None:
        """Copy blocks back from host memory into those behind the ones found in the pool."""
        first = len(sequence.block_hashes)
        blocks = sequence.block_table[first : first + len(on_host)]
        batch.swap_ins += zip(on_host, blocks, strict=True)
        self.num_loaded_tokens += len(blocks) * self.block_size
        self.commit(sequence, (first + len(blocks)) * self.block_size)

    def _num_behind(self, num_tokens: int) -> int:
        """Blocks that the token behind so many does not see, nor any that follows."""
        if not self.sliding_window:
            return 0
        return max(num_tokens + 1 - self.sliding_window, 0) // self.block_size

    def _writes_into_last(self, sequence: Sequence) -> bool:
        """Whether the next token goes into a block that the sequence has, maybe with others."""
        return sequence.num_computed_tokens < len(sequence.block_table) * self.block_size
