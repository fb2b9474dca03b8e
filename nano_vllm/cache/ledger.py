"""The books of a pool's references: who has which, and which are lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nano_vllm._core import BlockAllocator, BlockOwner

OWNERS = (BlockOwner.SEQUENCE, BlockOwner.PIN, BlockOwner.TRANSFER)


@dataclass(frozen=True)
class Leak:
    """References to a block that nobody has any more, now taken back."""

    block: int
    num_references: int
    owner: str
    """Of whose kind they were, or whose."""
    is_on_host: bool = False

    def __str__(self) -> str:
        place = "host block" if self.is_on_host else "block"
        return f"{self.num_references} references of a {self.owner} to {place} {self.block}"


def is_balanced(allocator: BlockAllocator, num_table_blocks: int = 0, num_pinned: int = 0) -> bool:
    """Whether a pool has as many references of each kind as there are owners, in constant time.

    Args:
        allocator: of the pool, while no step is scheduled: then nothing is held for a copy.
        num_table_blocks: that sequences hold.
        num_pinned: that pins hold.
    """
    return (
        allocator.num_references(BlockOwner.SEQUENCE) == num_table_blocks
        and allocator.num_references(BlockOwner.PIN) == num_pinned
        and allocator.num_references(BlockOwner.TRANSFER) == 0
    )


def take_back(
    allocator: BlockAllocator,
    in_tables: Counter[int],
    pinned: Counter[int],
    is_on_host: bool = False,
) -> list[Leak]:
    """Free what nobody has.

    Args:
        allocator: of the pool, while no step is scheduled.
        in_tables: how often each block is in the table of a sequence.
        pinned: how often in a pin.
        is_on_host: which pool it is, for the reports.

    Raises:
        RuntimeError: a block has fewer references than owners.
    """
    counts = (in_tables.total(), pinned.total(), 0)
    excess = {
        owner: allocator.num_references(owner) - count
        for owner, count in zip(OWNERS, counts, strict=True)
    }
    leaks = []
    for block in range(allocator.num_blocks):
        surplus = allocator.ref_count(block) - in_tables[block] - pinned[block]
        if surplus < 0:
            raise RuntimeError(f"block {block} has {-surplus} owners more than references")
        for owner, count in excess.items():
            taken = min(surplus, max(count, 0))
            if taken:
                # What it holds is not known to be what the index says.
                allocator.forget(block)
                allocator.free_many([block] * taken, owner)
                leaks.append(Leak(block, taken, owner.name.lower(), is_on_host))
                surplus -= taken
                excess[owner] -= taken
    return leaks
