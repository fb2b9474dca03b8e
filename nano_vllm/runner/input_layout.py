"""Where the parts of a step's input lie in the buffer that travels; without torch."""

from __future__ import annotations

from math import prod

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Dtypes, by name, and shapes of arrays that lie one behind the other."""
ITEMSIZES = {"int32": 4, "int64": 8}


def staging_bytes(max_num_tokens: int, max_num_seqs: int, max_blocks_per_seq: int) -> int:
    """Of the largest steps."""
    tables = (max_num_seqs, max_blocks_per_seq)
    return max(
        layout_bytes(mixed_layout(max_num_tokens, max_num_seqs, tables)),
        layout_bytes(decode_layout(max_num_seqs, max_num_seqs * max_blocks_per_seq)),
    )


def layout_bytes(layout: Layout) -> int:
    """Of all arrays."""
    return sum(array_bytes(*array) for array in layout.values())


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of one."""
    return ITEMSIZES[dtype] * prod(shape)


def decode_layout(size: int, num_changes: int) -> Layout:
    """The staging buffer of a step of decodes: but for the changes at its end, which travel as far
    as there are any, it is the same for all steps of a padded size.

    A change is a place in the device's block tables, table row * max_blocks_per_seq + index, and
    the block that is there from now on. `table_rows` says where each sequence's table is.
    """
    return {
        **_inputs_layout(size, size),
        "table_rows": ("int32", (size,)),
        "num_changes": ("int32", (1,)),
        "changes": ("int32", (num_changes, 2)),
    }


def mixed_layout(num_tokens: int, num_seqs: int, tables: tuple[int, int]) -> Layout:
    """The staging buffer of any other step: but for the block tables at its end, as many as there
    are sequences and as wide as the longest, it is the same for all steps of a padding.
    """
    return {**ahead_of_tables(num_tokens, num_seqs), "block_tables": ("int32", tables)}


def ahead_of_tables(num_tokens: int, num_seqs: int) -> Layout:
    """What is the same for all steps of a padding."""
    return {"sampled": ("int64", (2, num_seqs)), **_inputs_layout(num_tokens, num_seqs)}


def _inputs_layout(num_tokens: int, num_seqs: int) -> Layout:
    return {
        "input_ids": ("int64", (num_tokens,)),
        "positions": ("int64", (num_tokens,)),
        "slot_mapping": ("int64", (num_tokens,)),
        "query_start_loc": ("int32", (num_seqs + 1,)),
        "seq_lens": ("int32", (num_seqs,)),
        "shared_prefix": ("int32", (2, num_seqs)),
    }
