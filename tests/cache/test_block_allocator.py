"""The block allocator against a model of a few lines, driven by hypothesis, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nano_vllm._core import BlockAllocator, BlockState, OutOfBlocks

BLOCK_SIZE = 2
Content = tuple[bytes, tuple[int, ...]]  # parent hash, tokens
contents_tokens = st.tuples(st.integers(0, 2), st.integers(0, 1))


@dataclass
class Model:
    """What the allocator must do, with no thought for speed."""

    num_blocks: int
    refs: dict[int, int] = field(default_factory=dict)
    """Active blocks alone."""
    index: dict[Content, int] = field(default_factory=dict)
    queue: list[int] = field(default_factory=list)
    """The other blocks; the next to be allocated first."""

    def __post_init__(self) -> None:
        self.queue = list(range(self.num_blocks))

    def forget(self, block: int) -> None:
        self.index = {content: b for content, b in self.index.items() if b != block}

    def is_indexed(self, block: int) -> bool:
        return block in self.index.values()

    def allocate(self) -> int:
        block = self.queue.pop(0)
        self.forget(block)
        self.refs[block] = 1
        return block

    def free(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            del self.refs[block]
            self.queue.insert(len(self.queue) if self.is_indexed(block) else 0, block)

    def lookup(self, content: Content) -> int:
        block = self.index.get(content, -1)
        if block in self.queue:
            self.queue.remove(block)
        if block >= 0:
            self.refs[block] = self.refs.get(block, 0) + 1
        return block

    def state(self, block: int) -> BlockState:
        if block in self.refs:
            return BlockState.ACTIVE
        return BlockState.CACHED if self.is_indexed(block) else BlockState.FREE


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 6), hash_key=st.integers(0, 2**64 - 1))
    def start(self, num_blocks: int, hash_key: int) -> None:
        self.allocator = BlockAllocator(num_blocks, BLOCK_SIZE, hash_key)
        self.model = Model(num_blocks)
        self.parents = [b""]

    def held(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.refs)), label="block")

    def content(self, data: st.DataObject) -> Content:
        parent = data.draw(st.sampled_from(self.parents), label="parent")
        return parent, data.draw(contents_tokens, label="tokens")

    @rule()
    def allocate(self) -> None:
        if self.model.queue:
            assert self.allocator.allocate() == self.model.allocate()
        else:
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate()

    @rule(count=st.integers(0, 5))
    def allocate_many(self, count: int) -> None:
        if count <= len(self.model.queue):
            expected = [self.model.allocate() for _ in range(count)]
            assert self.allocator.allocate_many(count) == expected
        else:
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate_many(count)

    @precondition(lambda self: self.model.refs)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = self.held(data)
        self.allocator.share(block)
        self.model.refs[block] += 1

    @precondition(lambda self: self.model.refs)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = self.held(data)
        self.allocator.free(block)
        self.model.free(block)

    @rule(data=st.data())
    def free_many(self, data: st.DataObject) -> None:
        held = sorted(self.model.refs)
        blocks = data.draw(st.permutations(held).flatmap(lambda p: st.just(p[: len(p) // 2 + 1])))
        self.allocator.free_many(blocks)
        for block in reversed(blocks):
            self.model.free(block)

    @precondition(lambda self: self.model.refs)
    @rule(data=st.data())
    def make_writable(self, data: st.DataObject) -> None:
        block = self.held(data)
        if self.model.refs[block] == 1:
            assert self.allocator.make_writable(block) == block
            self.model.forget(block)
        elif self.model.queue:
            self.model.refs[block] -= 1
            assert self.allocator.make_writable(block) == self.model.allocate()
        else:
            with pytest.raises(OutOfBlocks):
                self.allocator.make_writable(block)

    @precondition(lambda self: self.model.refs)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        block, content = self.held(data), self.content(data)
        if self.model.is_indexed(block) and self.model.index.get(content) != block:
            with pytest.raises(ValueError, match="committed with other content"):
                self.allocator.commit(block, *content)
            return
        content_hash = self.allocator.commit(block, *content)
        assert content_hash == self.allocator.hash_block(*content)
        self.model.index.setdefault(content, block)
        self.parents = [b"", content_hash]

    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        content = self.content(data)
        assert self.allocator.lookup(*content) == self.model.lookup(content)

    @precondition(lambda self: self.model.queue)
    @rule(data=st.data())
    def misuse_a_block_that_nobody_holds(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.model.queue))
        for call in (
            lambda: self.allocator.free(block),
            lambda: self.allocator.share(block),
            lambda: self.allocator.make_writable(block),
            lambda: self.allocator.commit(block, b"", (0, 0)),
            lambda: self.allocator.free_many([*self.model.refs, block]),
        ):
            with pytest.raises(ValueError, match=f"block {block} is held by nobody"):
                call()

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        allocator, model = self.allocator, self.model
        allocator.check_integrity()
        states = [model.state(block) for block in range(model.num_blocks)]
        assert [allocator.state(block) for block in range(model.num_blocks)] == states
        assert allocator.num_active == states.count(BlockState.ACTIVE)
        assert allocator.num_cached == states.count(BlockState.CACHED)
        assert allocator.num_free == model.num_blocks - allocator.num_active
        for block in range(model.num_blocks):
            assert allocator.ref_count(block) == model.refs.get(block, 0)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, database=None
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


@pytest.mark.parametrize("size", [0, -1, 2**31 - 1, 2**40])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks must be in .*, got {size}"):
        BlockAllocator(size, 16)
    with pytest.raises(ValueError, match=f"block_size must be in .*, got {size}"):
        BlockAllocator(16, size)
