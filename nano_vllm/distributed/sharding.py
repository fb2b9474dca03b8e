"""Which parts of a checkpoint's tensors make up one rank's parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nano_vllm.distributed.partition import vocabulary_part


class Ranks(Protocol):
    """Where a rank stands among those that share the layers."""

    rank: int
    size: int


class Part(NamedTuple):
    """Consecutive rows, or columns."""

    source: slice
    """Of the checkpoint's tensor."""
    target: slice
    """Of the parameter."""


@dataclass(frozen=True)
class Sharding:
    """How a parameter is filled, which has it as its attribute `sharding`. Padding is filled by
    whoever makes the parameter.
    """

    dim: int
    """Along which tensors are cut: 0 for rows, 1 for columns."""
    shapes: Mapping[str | None, tuple[int, ...]]
    """Of whole tensors, by the id of a shard; None for the tensor that holds all of them."""
    parts: Mapping[str | None, list[Part]]

    def is_whole(self, shard_id: str | None) -> bool:
        """Whether all of a tensor is held, in its order."""
        size = self.shapes[shard_id][self.dim]
        return [part.source for part in self.parts[shard_id]] == [slice(0, size)]


def share(num_units: int, ranks: Ranks) -> range:
    """The units that a rank holds, as many as the others; where there are fewer units than ranks,
    several ranks hold the same one.
    """
    each = num_units // ranks.size
    if each == 0:
        unit = ranks.rank * num_units // ranks.size
        return range(unit, unit + 1)
    return range(ranks.rank * each, (ranks.rank + 1) * each)


def stacked_rows(
    shards: Mapping[str, int], unit: int, columns: tuple[int, ...], ranks: Ranks
) -> Sharding:
    """Rows of several tensors, one behind the other, of each its share.

    Args:
        shards: id of each tensor -> its rows.
        unit: rows that stay together.
        columns: the rest of the tensors' shape.
        ranks: who shares them.
    """
    shapes: dict[str | None, tuple[int, ...]] = {}
    parts: dict[str | None, list[Part]] = {}
    joined: list[Part] = []
    begin = end = 0
    for name, size in shards.items():
        held = share(size // unit, ranks)
        first, last = held.start * unit, held.stop * unit
        target = slice(end, end + last - first)
        shapes[name] = (size, *columns)
        parts[name] = [Part(slice(first, last), target)]
        source = slice(begin + first, begin + last)
        if joined and joined[-1].source.stop == source.start:
            before = joined.pop()
            joined.append(
                Part(
                    slice(before.source.start, source.stop), slice(before.target.start, target.stop)
                )
            )
        else:
            joined.append(Part(source, target))
        begin, end = begin + size, target.stop
    return Sharding(0, shapes | {None: (begin, *columns)}, parts | {None: joined})


def columns_of(rows: int, columns: int, ranks: Ranks) -> Sharding:
    """A rank's share of the columns of a matrix."""
    held = share(columns, ranks)
    part = Part(slice(held.start, held.stop), slice(0, len(held)))
    return Sharding(1, {None: (rows, columns)}, {None: [part]})


def on_first_rank(size: int, ranks: Ranks) -> Sharding:
    """A vector that the first rank alone has; the others' is all padding."""
    whole = slice(0, size)
    return Sharding(0, {None: (size,)}, {None: [Part(whole, whole)] if ranks.rank == 0 else []})


def vocabulary_rows(num_rows: int, columns: int, ranks: Ranks) -> tuple[int, range, Sharding]:
    """An embedding's rows, dealt out evenly, with padding behind the last ones.

    Returns:
        rows of each rank's parameter; the tokens that this rank holds; how they are filled.
    """
    each = vocabulary_part(num_rows, ranks.size)
    first = min(ranks.rank * each, num_rows)
    held = range(first, min(first + each, num_rows))
    parts = [Part(slice(held.start, held.stop), slice(0, len(held)))] if held else []
    return each, held, Sharding(0, {None: (num_rows, columns)}, {None: parts})
