"""prepare_batch against loops over the tokens, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_vllm._core import prepare_batch

OUTPUTS = (
    "out_input_ids",
    "out_positions",
    "out_slot_mapping",
    "out_query_start_loc",
    "out_seq_lens",
    "out_block_tables",
)


def arguments(
    num_computed: list[int], num_tokens: list[int], block_size: int, width: int, seed: int = 0
) -> dict[str, Any]:
    """A batch whose sequences know a few tokens and hold a block more than they need."""
    rng = np.random.default_rng(seed)
    seq_lens = [c + n for c, n in zip(num_computed, num_tokens, strict=True)]
    total, num_seqs = sum(num_tokens), len(num_tokens)
    return {
        "token_ids": [rng.integers(0, 2**31, n + 3).tolist() for n in seq_lens],
        "block_tables": [rng.integers(0, 2**31, n // block_size + 1).tolist() for n in seq_lens],
        "num_computed": num_computed,
        "num_tokens": num_tokens,
        "block_size": block_size,
        "out_input_ids": np.full(total, -1, np.int64),
        "out_positions": np.full(total, -1, np.int64),
        "out_slot_mapping": np.full(total, -1, np.int64),
        "out_query_start_loc": np.full(num_seqs + 1, -1, np.int32),
        "out_seq_lens": np.full(num_seqs, -1, np.int32),
        "out_block_tables": np.full((num_seqs, width + 5), -1, np.int32)[:, :width],
    }


@settings(deadline=None, database=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5),
    block_size=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_against_loops(sequences: list[tuple[int, int]], block_size: int, seed: int) -> None:
    num_computed, num_tokens = [c for c, _ in sequences], [n for _, n in sequences]
    args = arguments(num_computed, num_tokens, block_size, 81, seed)
    bounds = prepare_batch(**args)

    expected: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
    expected["out_query_start_loc"].append(0)
    for tokens, blocks, computed, count in zip(
        args["token_ids"], args["block_tables"], num_computed, num_tokens, strict=True
    ):
        for position in range(computed, computed + count):
            block, row = blocks[position // block_size], position % block_size
            expected["out_input_ids"].append(tokens[position])
            expected["out_positions"].append(position)
            expected["out_slot_mapping"].append(block * block_size + row)
        expected["out_query_start_loc"].append(len(expected["out_positions"]))
        expected["out_seq_lens"].append(computed + count)
        expected["out_block_tables"].append(blocks + [0] * (81 - len(blocks)))
    for name in OUTPUTS:
        assert args[name].tolist() == expected[name], name
    assert bounds == (max(num_tokens, default=0), max(expected["out_seq_lens"], default=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": [4, 20]}, "has 10 tokens, too few to compute tokens 6 to 26"),
        (
            {"block_tables": [[1, 2], [3]]},
            "sequence 1 of the batch has 1 blocks of 4 tokens, too few for 7 tokens",
        ),
        ({"block_tables": [[1, 2], [3, 4, 5, 6]]}, "4 blocks, more than the 3 columns"),
        ({"block_tables": [[1, 2], [3, -4]]}, r"block must be in \[0, 2\^31\), got -4"),
        ({"block_tables": [[1, 2]]}, "block_tables must have one entry for each of the 2"),
        ({"num_computed": [0]}, "num_computed must have one entry for each of the 2"),
        ({"num_computed": [0, -1]}, r"num_computed must be in \[0, 2\^31\), got -1"),
        ({"token_ids": [[1] * 7, [2] * 6 + [-5]]}, r"token id must be in \[0, 2\^31\), got -5"),
        ({"block_size": 0}, r"block_size must be in \[1, 2\^31\), got 0"),
        (
            {"out_positions": np.zeros(6, np.int64)},
            r"out_positions must have shape \[5\], got \[6\]",
        ),
        ({"out_seq_lens": np.zeros(2, np.int64)}, "out_seq_lens must be int32, got int64"),
        (
            {"out_block_tables": np.zeros((3, 2), np.int32)},
            r"out_block_tables must have shape \[2, any\], got \[3, 2\]",
        ),
        (
            {"out_block_tables": np.zeros((3, 2), np.int32).T},
            "out_block_tables must be contiguous in its last dimension",
        ),
        (
            {"out_input_ids": np.broadcast_to(np.int64(0), 5)},
            "out_input_ids must be contiguous",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    args = arguments([0, 6], [4, 1], 4, 3)
    if "num_tokens" in changes:
        for name in OUTPUTS[:3]:
            args[name] = np.zeros(sum(changes["num_tokens"]), np.int64)
    with pytest.raises(ValueError, match=message):
        prepare_batch(**{**args, **changes})


def test_read_only_output() -> None:
    args = arguments([0], [2], 4, 1)
    args["out_positions"].flags.writeable = False
    with pytest.raises(ValueError, match="out_positions must be writable"):
        prepare_batch(**args)


def test_lists_alone() -> None:
    args = arguments([0], [2], 4, 1)
    with pytest.raises(TypeError, match="token_ids must hold lists, got tuple"):
        prepare_batch(**{**args, "token_ids": [(1, 2, 3)]})
