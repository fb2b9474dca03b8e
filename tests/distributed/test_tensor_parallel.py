"""Ranks of a group generate what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.launch_ranks import start_ranks
from tests.distributed.rank_functions import generate_all, options_of
from tests.models.checkpoints import make_checkpoint

SECONDS = 120


def results_of(folder: Path, size: int, options: dict[str, Any], seed: int) -> dict[str, Any]:
    ranks = start_ranks(generate_all, size, folder, options, seed)
    codes = ranks.join(SECONDS)
    assert codes == [0] * size, [ranks.errors(rank) for rank in range(size)]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_two_ranks_generate_the_same(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path / "model")
    path = str(tmp_path / "model")
    expected = results_of(tmp_path / "one", 1, options_of(path), seed)
    assert expected["preemptions"]
    assert expected["cached"]
    found = results_of(tmp_path / "two", 2, options_of(path, tensor_parallel_size=2), seed)
    assert found == expected
