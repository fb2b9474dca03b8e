"""The block allocator against a model of a few lines, driven by hypothesis, and its errors."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nano_vllm._core import BlockAllocator, BlockOwner, BlockState, OutOfBlocks

BLOCK_SIZE = 2
ALL_OWNERS = (BlockOwner.SEQUENCE, BlockOwner.PIN, BlockOwner.TRANSFER)
Content = tuple[bytes, tuple[int, ...]]  # parent hash, tokens
contents_tokens = st.tuples(st.integers(0, 2), st.integers(0, 1))


@dataclass
class Model:
    """What the allocator must do, with no thought for speed."""

    num_blocks: int
    next_tier: Model | None = None
    refs: dict[int, int] = field(default_factory=dict)
    """Active blocks alone."""
    owned: Counter[str] = field(default_factory=Counter)
    """References of each owner, by its name."""
    index: dict[Content, int] = field(default_factory=dict)
    queue: list[int] = field(default_factory=list)
    """The other blocks; the next to be allocated first."""
    evictions: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = list(range(self.num_blocks))

    def content(self, block: int) -> Content | None:
        return next((content for content, b in self.index.items() if b == block), None)

    def is_indexed(self, block: int) -> bool:
        return block in self.index.values()

    def unindex(self, block: int) -> None:
        self.index = {content: b for content, b in self.index.items() if b != block}

    def forget(self, block: int) -> None:
        if self.state(block) == BlockState.CACHED:
            self.queue.remove(block)
            self.queue.insert(0, block)
        self.unindex(block)

    def allocate(self, owner: BlockOwner) -> int:
        block = self.queue.pop(0)
        content = self.content(block)
        if self.next_tier is not None and content is not None:
            there = self.next_tier.take_in(content)
            if there is not None:
                self.evictions.append((block, there))
        self.unindex(block)
        self.refs[block] = 1
        self.owned[owner.name] += 1
        return block

    def take_in(self, content: Content) -> int | None:
        """The block that gets evicted content, if one does."""
        is_known = content in self.index
        if not is_known and not self.queue:
            return None
        block = self.index[content] if is_known else self.queue[0]
        if block in self.queue:
            self.queue.remove(block)
            self.queue.append(block)
        self.unindex(block)
        self.index[content] = block
        return None if is_known else block

    def share(self, block: int, owner: BlockOwner) -> None:
        self.refs[block] = self.refs.get(block, 0) + 1
        self.owned[owner.name] += 1

    def free(self, block: int, owner: BlockOwner) -> None:
        self.owned[owner.name] -= 1
        self.refs[block] -= 1
        if self.refs[block] == 0:
            del self.refs[block]
            self.queue.insert(len(self.queue) if self.is_indexed(block) else 0, block)

    def lookup(self, content: Content, owner: BlockOwner) -> int:
        block = self.index.get(content, -1)
        if block in self.queue:
            self.queue.remove(block)
        if block >= 0:
            self.share(block, owner)
        return block

    def state(self, block: int) -> BlockState:
        if block in self.refs:
            return BlockState.ACTIVE
        return BlockState.CACHED if self.is_indexed(block) else BlockState.FREE


@dataclass
class Pool:
    allocator: BlockAllocator
    model: Model
    memory: list[Content | None]
    """What is in each block, whether the index knows it or not."""
    held: list[tuple[int, BlockOwner]] = field(default_factory=list)
    """One entry for each reference."""


def new_pool(num_blocks: int, hash_key: int) -> Pool:
    allocator = BlockAllocator(num_blocks, BLOCK_SIZE, hash_key)
    return Pool(allocator, Model(num_blocks), [None] * num_blocks)


owners = st.sampled_from(ALL_OWNERS)
of_tier = st.sampled_from([False, False, True])


class AllocatorMachine(RuleBasedStateMachine):
    """A pool and its next tier, and what is in the memory of both."""

    @initialize(
        num_blocks=st.integers(1, 6),
        num_tier_blocks=st.integers(1, 4),
        hash_key=st.integers(0, 2**64 - 1),
    )
    def start(self, num_blocks: int, num_tier_blocks: int, hash_key: int) -> None:
        self.pool = new_pool(num_blocks, hash_key)
        self.tier = new_pool(num_tier_blocks, hash_key)
        self.parents = [b""]

    def pick(self, of_tier: bool) -> Pool:
        return self.tier if of_tier else self.pool

    def held(self, data: st.DataObject, pool: Pool) -> tuple[int, BlockOwner]:
        index = data.draw(st.integers(0, len(pool.held) - 1), label="reference")
        return pool.held[index]

    def content(self, data: st.DataObject) -> Content:
        parent = data.draw(st.sampled_from(self.parents), label="parent")
        return parent, data.draw(contents_tokens, label="tokens")

    def write(self, pool: Pool, block: int, content: Content | None) -> None:
        self.copy_evictions()
        pool.memory[block] = content

    @rule(has_tier=st.booleans())
    def set_next_tier(self, has_tier: bool) -> None:
        self.copy_evictions()
        self.pool.allocator.set_next_tier(self.tier.allocator if has_tier else None)
        self.pool.model.next_tier = self.tier.model if has_tier else None

    @rule()
    def copy_evictions(self) -> None:
        evictions = self.pool.allocator.take_evictions()
        assert evictions == self.pool.model.evictions
        for block, tier_block in evictions:
            self.tier.memory[tier_block] = self.pool.memory[block]
        self.pool.model.evictions = []

    @rule(of_tier=of_tier, owner=owners)
    def allocate(self, of_tier: bool, owner: BlockOwner) -> None:
        pool = self.pick(of_tier)
        if pool.model.queue:
            block = pool.allocator.allocate(owner)
            assert block == pool.model.allocate(owner)
            pool.held.append((block, owner))
        else:
            with pytest.raises(OutOfBlocks):
                pool.allocator.allocate(owner)

    @rule(of_tier=of_tier, count=st.integers(0, 5), owner=owners)
    def allocate_many(self, of_tier: bool, count: int, owner: BlockOwner) -> None:
        pool = self.pick(of_tier)
        if count <= len(pool.model.queue):
            expected = [pool.model.allocate(owner) for _ in range(count)]
            assert pool.allocator.allocate_many(count, owner) == expected
            pool.held += [(block, owner) for block in expected]
        else:
            with pytest.raises(OutOfBlocks):
                pool.allocator.allocate_many(count, owner)

    @rule(of_tier=of_tier, owner=owners, data=st.data())
    def share(self, of_tier: bool, owner: BlockOwner, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        if pool.held:
            block, _ = self.held(data, pool)
            pool.allocator.share(block, owner)
            pool.model.share(block, owner)
            pool.held.append((block, owner))

    @rule(of_tier=of_tier, data=st.data())
    def free(self, of_tier: bool, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        if pool.held:
            block, owner = self.held(data, pool)
            pool.allocator.free(block, owner)
            pool.model.free(block, owner)
            pool.held.remove((block, owner))

    @rule(of_tier=of_tier, owner=owners, data=st.data())
    def free_many(self, of_tier: bool, owner: BlockOwner, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        blocks = sorted({block for block, holder in pool.held if holder == owner})
        blocks = data.draw(st.permutations(blocks))[: len(blocks) // 2 + 1]
        pool.allocator.free_many(blocks, owner)
        for block in reversed(blocks):
            pool.model.free(block, owner)
            pool.held.remove((block, owner))

    @rule(of_tier=of_tier, data=st.data())
    def make_writable(self, of_tier: bool, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        blocks = [block for block, owner in pool.held if owner == BlockOwner.SEQUENCE]
        if not blocks:
            return
        block = data.draw(st.sampled_from(blocks), label="block")
        writable = block
        if pool.model.refs[block] == 1:
            assert pool.allocator.make_writable(block) == block
            pool.model.unindex(block)
        elif pool.model.queue:
            pool.model.free(block, BlockOwner.SEQUENCE)
            writable = pool.allocator.make_writable(block)
            assert writable == pool.model.allocate(BlockOwner.SEQUENCE)
            pool.held.remove((block, BlockOwner.SEQUENCE))
            pool.held.append((writable, BlockOwner.SEQUENCE))
        else:
            with pytest.raises(OutOfBlocks):
                pool.allocator.make_writable(block)
            return
        self.write(pool, writable, None)

    @rule(of_tier=of_tier, data=st.data())
    def commit(self, of_tier: bool, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        if not pool.held:
            return
        (block, _), content = self.held(data, pool), self.content(data)
        if pool.model.is_indexed(block) and pool.model.index.get(content) != block:
            with pytest.raises(ValueError, match="committed with other content"):
                pool.allocator.commit(block, *content)
            return
        self.write(pool, block, content)
        content_hash = pool.allocator.commit(block, *content)
        assert content_hash == pool.allocator.hash_block(*content)
        pool.model.index.setdefault(content, block)
        self.parents = [b"", content_hash]

    @rule(of_tier=of_tier, owner=owners, data=st.data())
    def lookup(self, of_tier: bool, owner: BlockOwner, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        content = self.content(data)
        block = pool.allocator.lookup(*content, owner)
        assert block == pool.model.lookup(content, owner)
        if block >= 0:
            self.copy_evictions()
            assert pool.memory[block] == content
            pool.held.append((block, owner))

    @rule(
        of_tier=of_tier,
        owner=owners,
        data=st.data(),
        tokens=st.lists(contents_tokens, max_size=4),
        first=st.integers(0, 5),
        num_spare_tokens=st.integers(0, BLOCK_SIZE - 1),
    )
    def lookup_blocks(
        self,
        of_tier: bool,
        owner: BlockOwner,
        data: st.DataObject,
        tokens: list[tuple[int, ...]],
        first: int,
        num_spare_tokens: int,
    ) -> None:
        pool = self.pick(of_tier)
        parent = data.draw(st.sampled_from(self.parents), label="parent")
        found, hashes = [], []
        content_parent = parent
        for block_tokens in tokens[first:]:
            block = pool.model.lookup((content_parent, block_tokens), owner)
            if block < 0:
                break
            found.append(block)
            self.copy_evictions()
            assert pool.memory[block] == (content_parent, block_tokens)
            content_parent = pool.allocator.hash_block(content_parent, block_tokens)
            hashes.append(content_parent)
        token_ids = [token for block_tokens in tokens for token in block_tokens]
        token_ids += [0] * num_spare_tokens
        assert pool.allocator.lookup_blocks(token_ids, first, parent, owner) == (found, hashes)
        pool.held += [(block, owner) for block in found]

    @rule(owner=owners, data=st.data(), leaves=st.booleans())
    def compute(self, owner: BlockOwner, data: st.DataObject, leaves: bool) -> None:
        """Find a block or compute it, as a request does: random rules seldom come to evictions."""
        pool, content = self.pool, self.content(data)
        block = pool.allocator.lookup(*content, owner)
        assert block == pool.model.lookup(content, owner)
        if block < 0 and pool.model.queue:
            block = pool.allocator.allocate(owner)
            assert block == pool.model.allocate(owner)
            self.write(pool, block, content)
            pool.allocator.commit(block, *content)
            pool.model.index[content] = block
        if block < 0:
            return
        if leaves:
            pool.allocator.free(block, owner)
            pool.model.free(block, owner)
        else:
            pool.held.append((block, owner))

    @rule(of_tier=of_tier, data=st.data())
    def forget(self, of_tier: bool, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        block = data.draw(st.integers(0, pool.model.num_blocks - 1), label="block")
        pool.allocator.forget(block)
        pool.model.forget(block)

    @rule(of_tier=of_tier, data=st.data())
    def misuse_a_block_that_nobody_holds(self, of_tier: bool, data: st.DataObject) -> None:
        pool = self.pick(of_tier)
        if not pool.model.queue:
            return
        block = data.draw(st.sampled_from(pool.model.queue))
        for call in (
            lambda: pool.allocator.free(block),
            lambda: pool.allocator.share(block),
            lambda: pool.allocator.make_writable(block),
            lambda: pool.allocator.commit(block, b"", (0, 0)),
            lambda: pool.allocator.free_many([*pool.model.refs, block]),
        ):
            with pytest.raises(ValueError, match=f"block {block} is held by nobody"):
                call()

    @rule(of_tier=of_tier, owner=owners)
    def misuse_an_owner_without_so_many_references(self, of_tier: bool, owner: BlockOwner) -> None:
        pool = self.pick(of_tier)
        owned = pool.model.owned[owner.name]
        blocks = [block for block, _ in pool.held[: owned + 1]]
        if len(blocks) == owned:
            return
        message = f"{owned + 1} references of .* are freed, but there are {owned}$"
        with pytest.raises(ValueError, match=message):
            pool.allocator.free_many(blocks, owner)
        if owned == 0:
            with pytest.raises(ValueError, match=message):
                pool.allocator.free(blocks[0], owner)

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "tier"):
            return
        for pool in (self.pool, self.tier):
            allocator, model = pool.allocator, pool.model
            allocator.check_integrity()
            states = [model.state(block) for block in range(model.num_blocks)]
            assert [allocator.state(block) for block in range(model.num_blocks)] == states
            assert allocator.num_active == states.count(BlockState.ACTIVE)
            assert allocator.num_cached == states.count(BlockState.CACHED)
            assert allocator.num_free == model.num_blocks - allocator.num_active
            for block in range(model.num_blocks):
                assert allocator.ref_count(block) == model.refs.get(block, 0)
            for owner in ALL_OWNERS:
                assert allocator.num_references(owner) == model.owned[owner.name]


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, database=None
)


def test_hash_is_keyed_chained_and_the_same_for_every_kind_of_sequence() -> None:
    allocator = BlockAllocator(1, 4, hash_key=123)
    tokens = [1, 2, 3, 4]
    first = allocator.hash_block(b"", tokens)
    # OpenSSL: mac SIPHASH with size 16 over 16 zero bytes and the tokens as int32
    assert first.hex() == "15d295608c1c975ea928f499e268683a"
    assert allocator.hash_block(b"", tuple(tokens)) == first
    for dtype in (np.int32, np.int64, np.uint16):
        assert allocator.hash_block(b"", np.array(tokens, dtype)) == first
    assert allocator.hash_block(b"", np.repeat(tokens, 2)[::2]) == first
    assert allocator.hash_block(first, tokens) != first
    assert BlockAllocator(1, 4, hash_key=124).hash_block(b"", tokens) != first


def test_lookup_needs_the_parent() -> None:
    allocator = BlockAllocator(2, 1)
    first, second = allocator.allocate_many(2)
    parent = allocator.commit(first, b"", [5])
    allocator.commit(second, parent, [5])
    assert allocator.lookup(b"", [5]) == first
    assert allocator.lookup(parent, [5]) == second
    assert allocator.lookup(bytes(15) + b"\1", [5]) == -1


def test_the_tail_of_a_sequence_is_evicted_first() -> None:
    allocator = BlockAllocator(3, 1)
    blocks = allocator.allocate_many(3)
    parent = b""
    for token, block in enumerate(blocks):
        parent = allocator.commit(block, parent, [token])
    allocator.free_many(blocks)
    assert allocator.num_cached == 3
    assert [allocator.allocate() for _ in range(3)] == blocks[::-1]


def test_running_out_takes_nothing() -> None:
    allocator = BlockAllocator(3, 16)
    allocator.allocate()
    with pytest.raises(OutOfBlocks, match="3 KV blocks asked for, 2 of 3 are free"):
        allocator.allocate_many(3)
    assert allocator.num_free == 2
    allocator.allocate_many(2)
    with pytest.raises(OutOfBlocks, match="all 3 KV blocks are in use"):
        allocator.allocate()
    assert issubclass(OutOfBlocks, RuntimeError)


@pytest.mark.parametrize("block", [-1, 4, 2**40])
def test_block_out_of_range(block: int) -> None:
    allocator = BlockAllocator(4, 2)
    for call in (
        allocator.free,
        allocator.share,
        allocator.ref_count,
        allocator.state,
        allocator.make_writable,
        allocator.forget,
        lambda block: allocator.commit(block, b"", [0, 0]),
    ):
        with pytest.raises(ValueError, match=rf"block must be in \[0, 4\), got {block}"):
            call(block)


@pytest.mark.parametrize(
    ("parent", "token_ids", "message"),
    [
        (b"", [1], "token_ids must hold block_size 2 tokens, got 1"),
        (b"", np.zeros(3, np.int64), "token_ids must hold block_size 2 tokens, got 3"),
        (b"", [0, -1], r"token id must be in \[0, 2\^31\), got -1"),
        (b"", [0, 2**31], r"token id must be in \[0, 2\^31\), got 2147483648"),
        (b"", [0, 2**64], "got an integer of more than 64 bits"),
        (b"", np.array([0, -1]), r"token id must be in \[0, 2\^31\), got -1"),
        (b"", np.zeros(2), "one-dimensional array of integers, got float64"),
        (b"", np.zeros((1, 2), np.int64), "one-dimensional array of integers"),
        (b"short", [0, 0], 'parent must be b"" or 16 bytes long, got 5 bytes'),
    ],
)
def test_bad_content(parent: bytes, token_ids: list[int], message: str) -> None:
    allocator = BlockAllocator(1, 2)
    block = allocator.allocate()
    for call in (
        lambda: allocator.hash_block(parent, token_ids),
        lambda: allocator.lookup(parent, token_ids),
        lambda: allocator.commit(block, parent, token_ids),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError):
        allocator.lookup(b"", ["a", "b"])


def test_evicted_content_is_in_the_next_tier() -> None:
    allocator, tier = BlockAllocator(3, 1), BlockAllocator(2, 1)
    allocator.set_next_tier(tier)
    tokens = [5, 6, 7]
    blocks, hashes = allocator.allocate_many(3), []
    allocator.commit_blocks(blocks, hashes, tokens, 3)
    allocator.free_many(blocks)
    allocator.allocate_many(2)
    assert allocator.take_evictions() == [(2, 0), (1, 1)]
    assert allocator.take_evictions() == []
    assert allocator.lookup_blocks(tokens, 0, b"") == ([0], hashes[:1])
    assert tier.lookup_blocks(tokens, 1, hashes[0], BlockOwner.TRANSFER) == ([1, 0], hashes[1:])
    assert tier.num_references(BlockOwner.TRANSFER) == 2


def test_what_the_next_tier_has_already_is_not_copied_again() -> None:
    allocator, tier = BlockAllocator(1, 1), BlockAllocator(2, 1)
    allocator.set_next_tier(tier)
    for token, evictions in ((5, []), (6, [(0, 0)]), (5, [(0, 1)]), (6, []), (5, [])):
        allocator.commit(allocator.allocate(), b"", [token])
        allocator.free(0)
        assert allocator.take_evictions() == evictions
        tier.check_integrity()
        assert tier.num_active == 0
    assert [tier.num_references(owner) for owner in ALL_OWNERS] == [0, 0, 0]


def test_what_is_written_into_is_not_found() -> None:
    allocator = BlockAllocator(2, 1)
    block = allocator.allocate()
    allocator.commit(block, b"", [5])
    assert allocator.make_writable(block) == block
    assert allocator.lookup(b"", [5]) == -1
    allocator.free(block)
    assert allocator.num_cached == 0


def test_content_is_lost_where_the_next_tier_is_held() -> None:
    allocator, tier = BlockAllocator(1, 1), BlockAllocator(1, 1)
    allocator.set_next_tier(tier)
    tier.allocate()
    allocator.commit(allocator.allocate(), b"", [5])
    allocator.free(0)
    assert allocator.allocate() == 0
    assert allocator.take_evictions() == []
    assert tier.lookup(b"", [5]) == -1


def test_a_pool_keeps_its_next_tier_alive() -> None:
    allocator = BlockAllocator(1, 1)
    allocator.set_next_tier(BlockAllocator(1, 1))
    gc.collect()
    allocator.commit(allocator.allocate(), b"", [5])
    allocator.free(0)
    allocator.allocate()
    assert allocator.take_evictions() == [(0, 0)]


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        (lambda pool: pool, "must be another pool of the same block size and hash key"),
        (lambda _: BlockAllocator(4, 3, 9), "must be another pool of the same block size"),
        (lambda _: BlockAllocator(4, 2, 8), "must be another pool of the same block size"),
        (lambda pool: with_next_tier(pool), "the next tier must have no next tier itself"),
    ],
)
def test_bad_next_tier(tier: Callable[[BlockAllocator], BlockAllocator], message: str) -> None:
    allocator = BlockAllocator(4, 2, 9)
    with pytest.raises(ValueError, match=message) as error:
        allocator.set_next_tier(tier(allocator))
    assert "\n" not in str(error.value)
    allocator.check_integrity()


def with_next_tier(tier: BlockAllocator) -> BlockAllocator:
    allocator = BlockAllocator(4, 2, 9)
    allocator.set_next_tier(tier)
    return allocator


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (BlockOwner.SEQUENCE, "sequences"),
        (BlockOwner.PIN, "pins"),
        (BlockOwner.TRANSFER, "transfers"),
    ],
)
def test_an_owner_frees_no_more_than_it_has(owner: BlockOwner, name: str) -> None:
    allocator = BlockAllocator(4, 2)
    others = set(ALL_OWNERS) - {owner}
    for other in others:
        allocator.allocate(other)
    with pytest.raises(ValueError, match=f"^1 references of {name} are freed, but there are 0$"):
        allocator.free(0, owner)
    with pytest.raises(ValueError, match=f"^2 references of {name} are freed, but there are 0$"):
        allocator.free_many([0, 1], owner)
    assert [allocator.ref_count(block) for block in range(4)] == [1, 1, 0, 0]
    assert allocator.num_references(owner) == 0
    assert all(allocator.num_references(other) == 1 for other in others)
    allocator.check_integrity()


def test_no_sequence_writes_into_what_pins_alone_hold() -> None:
    allocator = BlockAllocator(2, 2)
    block = allocator.allocate(BlockOwner.PIN)
    for _ in range(2):
        with pytest.raises(ValueError, match="references of sequences"):
            allocator.make_writable(block)
        allocator.share(block, BlockOwner.PIN)
    assert allocator.num_references(BlockOwner.PIN) == 3
    assert allocator.num_free == 1


@pytest.mark.parametrize(
    ("token_ids", "first", "parent", "error", "message"),
    [
        ([1, 2, 3, 4], -1, b"", ValueError, "first must be at least 0, got -1"),
        ([1, 2, 3, 4], 0, b"short", ValueError, "must be .* 16 bytes long, got 5 bytes"),
        ([1, 2, 3, -4], 0, b"", ValueError, r"token id must be in \[0, 2\^31\), got -4"),
        ([1, 2, 3, 2**31], 0, b"", ValueError, r"token id must be in \[0, 2\^31\), got 2147483648"),
        ([1, 2, 3, 2**64], 0, b"", ValueError, "got an integer of more than 64 bits"),
        ([1, 2, 3, "4"], 0, b"", TypeError, "integer"),
        ((1, 2, 3, 4), 0, b"", TypeError, "incompatible function arguments"),
    ],
)
def test_bad_lookup_blocks_takes_nothing(
    token_ids: list[int], first: int, parent: bytes, error: type[Exception], message: str
) -> None:
    allocator = BlockAllocator(2, 2)
    blocks = allocator.allocate_many(2)
    allocator.commit_blocks(blocks, [], [1, 2, 3, 4], 4)
    for num_references in (2, 0):
        with pytest.raises(error, match=message):
            allocator.lookup_blocks(token_ids, first, parent, BlockOwner.PIN)
        assert allocator.num_references(BlockOwner.PIN) == 0
        assert allocator.num_references(BlockOwner.SEQUENCE) == num_references
        assert allocator.num_cached == 2 - num_references
        allocator.check_integrity()
        if num_references:
            allocator.free_many(blocks)
    assert allocator.lookup_blocks([1, 2, 3, 4], 0, b"")[0] == blocks


def test_lookup_blocks_ends_before_the_first_that_is_not_there() -> None:
    allocator = BlockAllocator(4, 2)
    blocks, hashes = allocator.allocate_many(3), []
    tokens = [1, 2, 3, 4, 5, 6]
    allocator.commit_blocks(blocks, hashes, tokens, 6)
    allocator.forget(blocks[1])
    assert allocator.lookup_blocks(tokens, 0, b"") == (blocks[:1], hashes[:1])
    assert allocator.lookup_blocks(tokens, 2, hashes[1]) == (blocks[2:], hashes[2:])
    assert allocator.lookup_blocks(tokens, 3, hashes[2]) == ([], [])
    assert allocator.lookup_blocks(tokens, 2**40, b"") == ([], [])
    assert allocator.lookup_blocks(tokens[:1], 0, b"") == ([], [])
    assert [allocator.ref_count(block) for block in blocks] == [2, 1, 2]


def test_the_root_stands_before_the_first_block_alone() -> None:
    allocator = BlockAllocator(4, 1)
    root = bytes(range(16))
    hashes: list[bytes] = []
    blocks = allocator.allocate_many(2)
    allocator.commit_blocks(blocks, hashes, [5, 6], 1, root)
    allocator.commit_blocks(blocks, hashes, [5, 6], 2, root)
    assert hashes[0] == allocator.hash_block(root, [5])
    assert hashes[1] == allocator.hash_block(hashes[0], [6])
    assert allocator.lookup_blocks([5, 6], 0, root) == (blocks, hashes)
    assert allocator.lookup_blocks([5, 6], 0, b"") == ([], [])
    with pytest.raises(ValueError, match="16 bytes long, got 5 bytes"):
        allocator.commit_blocks(allocator.allocate_many(1), [], [7], 1, b"short")


def test_forget() -> None:
    allocator = BlockAllocator(3, 1)
    blocks = allocator.allocate_many(3)
    for token, block in enumerate(blocks):
        allocator.commit(block, b"", [token])
    allocator.free_many([0, 1])
    allocator.forget(0)
    assert (allocator.num_cached, allocator.num_free) == (1, 2)
    assert allocator.lookup(b"", [0]) == -1
    assert allocator.allocate() == 0  # a Free one before a Cached one
    allocator.forget(2)
    assert allocator.lookup(b"", [2]) == -1
    allocator.commit(2, b"", [9])  # no longer what it was
    allocator.free(2)
    assert allocator.state(2) == BlockState.CACHED
    allocator.forget(0)  # nothing to forget
    allocator.check_integrity()


@pytest.mark.parametrize("size", [0, -1, 2**31 - 1, 2**40])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks must be in .*, got {size}"):
        BlockAllocator(size, 16)
    with pytest.raises(ValueError, match=f"block_size must be in .*, got {size}"):
        BlockAllocator(16, size)
