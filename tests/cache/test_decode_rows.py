"""DecodeRows against lists: the same blocks, inputs and ends, whatever comes and goes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from nano_vllm._core import (
    BlockAllocator,
    DecodeRows,
    DecodeStep,
    find_shared_prefixes,
    prepare_batch,
)

WIDTH = 12
MAX_ROWS = 6


class ListRow:
    """A sequence that decodes, in plain Python."""

    def __init__(self, tokens: list[int], table: list[int], hashes: list[bytes]) -> None:
        self.tokens, self.table, self.hashes = tokens, table, hashes
        self.max_tokens, self.min_tokens = 0, 0
        self.ends: frozenset[int] = frozenset()
        self.is_followed = False
        self.row_id = -1

    def slots(self, size: int) -> int:
        return len(self.table) * size


class Trace:
    """Rows in C++, and beside them lists over an allocator of their own."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.size = draw.choice([1, 3, 16])
        self.commits = draw.random() < 0.7
        num_blocks = draw.choice([20, 200])
        self.allocators = [BlockAllocator(num_blocks, self.size) for _ in range(2)]
        self.rows = DecodeRows(self.allocators[0], MAX_ROWS)
        self.ours: list[ListRow] = []
        self.plain: list[ListRow] = []
        self.sent = np.zeros((MAX_ROWS, 2), np.int64)
        self.copy = np.full((MAX_ROWS, WIDTH), -7, np.int32)
        self.happened: dict[str, int] = {}

    def note(self, name: str, count: int = 1) -> None:
        self.happened[name] = self.happened.get(name, 0) + count

    def add(self, joins: bool = False) -> None:
        """A row, with blocks for all of its tokens but the last, or for all if it joins a step."""
        draw, size = self.draw, self.size
        tokens = [draw.randrange(100) for _ in range(draw.randint(2, 3 * size + 2))]
        sibling = draw.choice(self.plain) if self.plain and draw.random() < 0.5 else None
        shared = 0
        if sibling is not None:  # it begins with the same full blocks
            shared = draw.randint(0, min(3, len(sibling.tokens) - 1) // size)
            tokens = sibling.tokens[: shared * size] + tokens
        num_computed = len(tokens) - (not joins)
        missing = -(-num_computed // size) - shared
        if missing > self.allocators[0].num_free or len(tokens) + 2 > WIDTH * size:
            return
        limits = (len(tokens) + draw.randint(1, 30), len(tokens) + draw.randint(0, 3))
        ends = frozenset(draw.choices(range(200), k=draw.choice([0, 1, 20])))
        is_followed = draw.random() < 0.2
        pairs = [(self.ours, self.allocators[0]), (self.plain, self.allocators[1])]
        for rows, allocator in pairs:
            head = rows[self.plain.index(sibling)].table[:shared] if sibling is not None else []
            for block in head:
                allocator.share(block)
            row = ListRow(list(tokens), head + allocator.allocate_many(missing), [])
            if self.commits:
                allocator.commit_blocks(row.table, row.hashes, row.tokens, num_computed)
            row.max_tokens, row.min_tokens = min(limits[0], (WIDTH - 1) * size), limits[1]
            row.ends, row.is_followed = ends, is_followed
            if rows is self.plain:
                rows.append(row)
                continue
            row.row_id = self.rows.add(
                row,
                row.tokens,
                row.table,
                row.hashes,
                row.max_tokens,
                row.min_tokens,
                ends,
                is_followed,
            )
            added = row
        self.ours.append(added)

    def remove(self, index: int) -> None:
        self.rows.remove(self.ours[index].row_id)
        for rows, allocator in zip((self.ours, self.plain), self.allocators, strict=True):
            allocator.free_many(rows.pop(index).table)

    def schedule(self) -> DecodeStep:
        """A step of those that have a slot, in both ways."""
        most = self.draw.choice([2, MAX_ROWS, MAX_ROWS])
        step = self.rows.schedule(most)
        served = 0
        for row in self.plain[:most]:
            if len(row.tokens) > row.slots(self.size):
                if self.allocators[1].num_free == 0:
                    self.note("dry")
                    break
                row.table.append(self.allocators[1].allocate())
            served += 1
        assert step.scheduled == self.ours[:served]
        assert len(step) == served
        return step

    def join(self, step: DecodeStep) -> list[ListRow]:
        """A sequence whose first tokens the step computes besides, or none."""
        before = len(self.ours)
        if before < MAX_ROWS and self.draw.random() < 0.3:
            self.add(joins=True)
        joined = self.ours[before:]
        for row in joined:
            self.note("joined")
            step.join(row.row_id)
        return joined

    def take_first(self, joined: list[ListRow]) -> None:
        for row in joined:
            if row not in self.ours:
                continue
            index, token = self.ours.index(row), self.draw.randrange(200)
            self.rows.take(row.row_id, token)
            self.plain[index].tokens.append(token)
            if len(row.tokens) >= row.max_tokens:
                self.remove(index)

    def schedule_ahead(self, behind: DecodeStep, joined: list[ListRow]) -> DecodeStep | None:
        most = self.draw.choice([2, MAX_ROWS, MAX_ROWS])
        ahead = self.rows.schedule_ahead(behind, most)
        places = {id(row): place for place, row in enumerate([*behind.scheduled, *joined])}
        staying = [
            index for index, row in enumerate(self.plain) if len(row.tokens) + 1 < row.max_tokens
        ]
        full = [i for i in staying if len(self.plain[i].tokens) == self.plain[i].slots(self.size)]
        if (
            not all(id(row) in places for row in self.ours)
            or len(staying) > most
            or len(full) > self.allocators[1].num_free
        ):
            assert ahead is None
            return None
        for index in full:
            self.plain[index].table.append(self.allocators[1].allocate())
        assert ahead is not None
        assert ahead.scheduled == [self.ours[index] for index in staying]
        assert ahead.ahead_rows == [places[id(self.ours[index])] for index in staying]
        self.note("ahead")
        return ahead

    def check_inputs(self, step: DecodeStep, lead: int) -> None:
        """What the step writes is what `prepare_batch` makes of the lists."""
        rows = [self.plain[self.ours.index(row)] for row in step.scheduled]
        count, padding = len(rows), self.draw.choice([0, 3])
        expected = self.arrays(count, 0)
        tables = np.zeros((count, WIDTH), np.int32)
        bounds = prepare_batch(
            [row.tokens + [0] * lead for row in rows],
            [row.table for row in rows],
            [len(row.tokens) - 1 + lead for row in rows],
            [1] * count,
            self.size,
            *expected,
            tables,
        )
        written = self.arrays(count, padding)
        assert step.write_inputs(*written) == bounds[1]
        for ours, theirs, fill in zip(written, expected, (0, 0, -1, count, 0), strict=True):
            assert ours.tolist() == theirs.tolist() + [fill] * padding
        dense = np.full((count, WIDTH + 2), -1, np.int32)
        step.write_tables(dense[:, :WIDTH])
        assert dense[:, :WIDTH].tolist() == tables.tolist()
        if not count:  # part of a step of prompts: not written as one of decodes alone
            return

        table_rows = np.full(count + padding, -1, np.int32)
        changes = np.full((count * WIDTH, 2), -1, np.int32)
        num_changes = step.write_table_changes(WIDTH, self.sent, table_rows, changes)
        assert (changes[num_changes:] == -1).all()
        self.note("changes", num_changes)
        self.copy.reshape(-1)[changes[:num_changes, 0]] = changes[:num_changes, 1]
        assert not table_rows[count:].any()
        assert len(set(table_rows[:count].tolist())) == count
        for row, table in zip(table_rows.tolist(), (row.table for row in rows), strict=False):
            assert self.copy[row, : len(table)].tolist() == table
        assert step.write_table_changes(WIDTH, self.sent, table_rows, changes) == 0

        shared, ours_shared = np.zeros((2, count), np.int32), np.zeros((2, count), np.int32)
        saved = find_shared_prefixes(expected[3], expected[4], tables, self.size, 0, shared)
        assert step.find_shared_prefixes(0, ours_shared) == saved
        if saved:
            assert ours_shared.tolist() == shared.tolist()
            self.note("shared")

    def arrays(self, count: int, padding: int) -> list[Any]:
        size = count + padding
        ints = [np.full(size, -5, np.int64) for _ in range(3)]
        return [*ints, np.full(size + 1, -5, np.int32), np.full(size, -5, np.int32)]

    def take(self, step: DecodeStep) -> None:
        tokens = [self.draw.choice([-1, 7, *range(100)]) for _ in step.scheduled]
        tokens += [1, 2]  # of rows that are none of the step's decodes
        noticed, over = [], []
        for place, row in enumerate(step.scheduled):
            if row not in self.ours:
                self.note("in vain")
                continue
            index = self.ours.index(row)
            plain, token = self.plain[index], tokens[place]
            if token < 0:
                noticed.append(place)
                over.append(index)
                continue
            plain.tokens.append(token)
            num_computed = len(plain.tokens) - 1
            if self.commits:
                for block in range(len(plain.hashes), num_computed // self.size):
                    content = plain.tokens[block * self.size : (block + 1) * self.size]
                    parent = plain.hashes[-1] if plain.hashes else b""
                    plain.hashes.append(
                        self.allocators[1].commit(plain.table[block], parent, content)
                    )
            ends = token in plain.ends and len(plain.tokens) > plain.min_tokens
            ends = ends or len(plain.tokens) >= plain.max_tokens
            if ends or plain.is_followed:
                noticed.append(place)
            if ends:
                self.note("ended")
                over.append(index)
        assert self.rows.advance(step, tokens, self.commits) == noticed
        for index in reversed(over):
            self.remove(index)

    def check(self) -> None:
        assert len(self.rows) == len(self.ours)
        for ours, plain in zip(self.ours, self.plain, strict=True):
            assert (ours.tokens, ours.table, ours.hashes) == (
                plain.tokens,
                plain.table,
                plain.hashes,
            )
        for allocator in self.allocators:
            allocator.check_integrity()
        assert self.allocators[0].num_free == self.allocators[1].num_free


def run_trace(seed: int) -> dict[str, int]:
    trace = Trace(random.Random(seed))
    draw = trace.draw
    behind: DecodeStep | None = None
    for _ in range(40):
        while len(trace.ours) < MAX_ROWS and draw.random() < 0.4:
            before = len(trace.ours)
            trace.add()
            if len(trace.ours) == before:
                break
        if trace.ours and draw.random() < 0.1:
            trace.remove(draw.randrange(len(trace.ours)))
        step, behind = behind, None
        if step is None:
            step = trace.schedule()
            if not len(step):
                if trace.ours:
                    trace.remove(len(trace.ours) - 1)
                continue
            trace.check_inputs(step, 0)
        joined = trace.join(step)
        if draw.random() < 0.7:
            behind = trace.schedule_ahead(step, joined)
            if behind is not None:
                trace.check_inputs(behind, 1)
                if draw.random() < 0.2:  # both fail, and are scheduled again
                    trace.note("dropped")
                    behind = None
                    for row in joined:
                        trace.remove(trace.ours.index(row))
                    continue
        trace.take(step)
        trace.take_first(joined)
        trace.check()
    return trace.happened


@pytest.mark.parametrize("group", range(4))
def test_rows_are_lists(group: int) -> None:
    happened: dict[str, int] = {}
    for seed in range(100 * group, 100 * group + 100):
        for name, count in run_trace(seed).items():
            happened[name] = happened.get(name, 0) + count
    expected = {"dry", "ahead", "joined", "changes", "shared", "in vain", "ended", "dropped"}
    assert happened.keys() == expected, f"the traces lack variety: {happened}"


def make_rows(max_rows: int = 2) -> tuple[DecodeRows, list[int], list[int]]:
    allocator = BlockAllocator(8, 4)
    rows = DecodeRows(allocator, max_rows)
    tokens, table = [1, 2, 3], allocator.allocate_many(1)
    return rows, tokens, table


def add(
    rows: DecodeRows, tokens: list[int], table: list[int], ends: frozenset[int] = frozenset()
) -> int:
    return rows.add("row", tokens, table, [], 100, 0, ends, False)


def test_an_end_token_is_that_token_alone() -> None:
    """Not those that are equal to it modulo 64."""
    rows, tokens, table = make_rows()
    add(rows, tokens, table, frozenset({5}))
    for token, noticed in ((69, []), (64, []), (5, [0])):
        assert rows.advance(rows.schedule(9), [token], False) == noticed
    assert tokens == [1, 2, 3, 69, 64, 5]


def test_rows_are_given_away_once() -> None:
    rows, tokens, table = make_rows(max_rows=1)
    first = add(rows, tokens, table)
    with pytest.raises(ValueError, match="all 1 rows are taken"):
        add(rows, tokens, table)
    rows.remove(first)
    with pytest.raises(ValueError, match=f"there is no row {first}"):
        rows.remove(first)
    assert add(rows, tokens, table) > first
    assert len(rows) == 1


def test_a_step_is_prepared_while_its_rows_are_here() -> None:
    rows, tokens, table = make_rows()
    row_id = add(rows, tokens, table)
    step = rows.schedule(9)
    rows.remove(row_id)
    arrays = [np.zeros(1, np.int64) for _ in range(3)]
    arrays += [np.zeros(2, np.int32), np.zeros(1, np.int32)]
    with pytest.raises(ValueError, match="of the step's 1 rows 0 are still here"):
        step.write_inputs(*arrays)
    with pytest.raises(ValueError, match="of the step's 1 rows 0 are still here"):
        step.write_tables(np.zeros((1, 1), np.int32))


def test_refusals() -> None:
    rows, tokens, table = make_rows()
    for bad, message in (([], "a row needs a token"), ([1] * 6, "6 tokens has blocks for 4")):
        with pytest.raises(ValueError, match=message):
            add(rows, bad, table)
    row_id = add(rows, tokens, table)
    with pytest.raises(ValueError, match="token id must not be below 0, got -1"):
        rows.take(row_id, -1)
    with pytest.raises(ValueError, match="there is no row 7"):
        rows.take(7, 1)
    step = rows.schedule(9)
    sent, row, changes = (
        np.zeros((2, 2), np.int64),
        np.zeros(1, np.int32),
        np.zeros((9, 2), np.int32),
    )
    with pytest.raises(ValueError, match="token_ids must have one entry for each of the 1 rows"):
        rows.advance(step, [], True)
    with pytest.raises(ValueError, match=r"token id must be below 2\^31, got 2147483648"):
        rows.advance(step, [2**31], True)
    with pytest.raises(ValueError, match="a step of 1 rows does not fit arrays of 0"):
        step.write_table_changes(2, sent, row[:0], changes)
    with pytest.raises(ValueError, match="more than 0 changes of the block tables"):
        step.write_table_changes(2, sent, row, changes[:0])
    with pytest.raises(ValueError, match="1 blocks, more than the 0 columns"):
        step.write_table_changes(0, sent, row, changes)
    with pytest.raises(ValueError, match="sent must have an entry for each of the 2 rows, got 1"):
        step.write_table_changes(2, sent[:1], row, changes)
    with pytest.raises(ValueError, match="out_table_rows must be int32, got int64"):
        step.write_table_changes(2, sent, np.zeros(1, np.int64), changes)
    with pytest.raises(ValueError, match="sent and out_changes must be contiguous"):
        step.write_table_changes(2, sent, row, np.zeros((9, 4), np.int32)[:, :2])


def test_peak_growth_counts_what_is_taken_and_given_back() -> None:
    allocator = BlockAllocator(100, 4)
    rows = DecodeRows(allocator, 8)

    def add(num_tokens: int, max_num_tokens: int, table: list[int]) -> None:
        rows.add(None, [1] * num_tokens, table, [], max_num_tokens, 0, (), False)

    def growth(horizon: int, others: list[tuple[int, int, int, int]] | None = None) -> int:
        return rows.peak_growth(horizon, others or [])

    assert growth(64) == 0
    first = allocator.allocate_many(2)
    add(7, 30, first)  # two slots left, of which one is for the token known last
    assert [growth(h) for h in (0, 1, 2, 5, 6, 10, 64)] == [0, 0, 1, 1, 2, 3, 6]
    # Ends with its third token, before it needs a block; of two blocks it shares one.
    allocator.share(first[0])
    add(4, 7, [first[0], allocator.allocate()])
    assert [growth(h) for h in (0, 2, 3, 6, 10)] == [0, 1, 1, 1, 2]
    # The same as a row of its own would.
    assert [growth(h, [(7, 30, 2, 0)]) for h in (1, 2, 6)] == [0, 2, 3]
    assert growth(6, [(9, 30, 2, 0)]) == 2 + 2 - 1
    with pytest.raises(ValueError, match="horizon must be in"):
        growth(-1)
    with pytest.raises(ValueError, match="a growing sequence must have tokens, got 0"):
        growth(1, [(0, 4, 1, 0)])
    with pytest.raises(ValueError, match="in 1 blocks, of which 2 are freed"):
        growth(1, [(9, 14, 1, 2)])


def test_peak_growth_counts_what_is_given_back_behind_a_window() -> None:
    allocator = BlockAllocator(100, 4)
    rows = DecodeRows(allocator, 8, sliding_window=6)
    rows.add(None, [1] * 9, allocator.allocate_many(2), [], 60, 0, (), False)
    # It takes its third block at once, the fourth and fifth for one each of those before.
    assert [rows.peak_growth(h, []) for h in (0, 3, 4, 8, 40)] == [1, 1, 1, 1, 1]
    assert [rows.peak_growth(h, [(9, 60, 2, 0)]) for h in (0, 40)] == [2, 2]
    # Of three blocks the first is freed: the next is one more, those behind it are not.
    assert [rows.peak_growth(h, [(12, 60, 3, 1)]) for h in (0, 1, 40)] == [1, 2, 2]


def test_rows_know_which_blocks_are_not_their_own() -> None:
    rows = DecodeRows(allocator := BlockAllocator(9, 4), 2, sliding_window=6)
    table = allocator.allocate_many(3)
    allocator.free(table[0])
    rows.add(None, [1] * 10, table, [], 60, 0, (), False, num_freed_blocks=1)
    assert rows.num_blocks == 2
    with pytest.raises(ValueError, match="a row of 9 tokens lacks its first 1 blocks"):
        rows.add(None, [1] * 9, table, [], 60, 0, (), False, num_freed_blocks=1)
    with pytest.raises(ValueError, match="sliding_window must be at least 0, got -1"):
        DecodeRows(allocator, 2, -1)


def test_rows_of_steps_under_way_are_left_out() -> None:
    allocator = BlockAllocator(4, 8)
    rows = DecodeRows(allocator, 6)
    names = ["a", "b", "c", "d"]

    def add(name: str) -> int:
        return rows.add(name, [1, 2, 3], [allocator.allocate()], [], 9, 0, (), False)

    for name in names[:3]:
        add(name)
    first = rows.schedule(1)
    joined = add(names[3])
    first.join(joined)
    second = rows.schedule(1, [first])
    third = rows.schedule(6, [first, second])
    assert [step.scheduled for step in (first, second, third)] == [["a"], ["b"], ["c"]]
    assert not rows.schedule(6, [first, second, third]).scheduled
    rows.advance(first, [7], False)
    assert rows.schedule(6, [second, third]).scheduled == ["a", "d"]


def test_rows_without_a_block_are_counted() -> None:
    """As far as the step could have held them; those under way are not."""
    allocator = BlockAllocator(4, 8)
    rows = DecodeRows(allocator, 4)
    for name in "abcd":  # each of them needs another block
        rows.add(name, [1] * 9, [allocator.allocate()], [], 20, 0, (), False)
    assert rows.schedule(3).num_missing == 3
    assert rows.schedule(9).num_missing == 4
