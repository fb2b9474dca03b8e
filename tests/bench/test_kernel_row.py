"""The table stays readable with every peer there is."""

from __future__ import annotations

import pytest
import torch

from nano_vllm.bench.attention_grid import DECODES, MODELS, PREFILLS
from nano_vllm.bench.attention_peers import AttentionPeer
from nano_vllm.bench.kernel_row import Setup, table_line
from nano_vllm.bench.kernels import PEERS
from nano_vllm.bench.report import report


def test_table_fits_160_columns(capsys: pytest.CaptureFixture[str]) -> None:
    peers = tuple(AttentionPeer(name, "1", True, lambda inputs: None) for name in PEERS)
    setup = Setup(torch.device("cpu"), torch.float32, 16, copy=3e12, matmul=8e14, peers=peers)
    times: dict[str, float | None] = dict.fromkeys(PEERS, 0.0123456)
    rows = [
        setup.row(shape.kernel, heads, shape.name, 0.0123456, flops=10**13, peers=times)
        for heads in MODELS.values()
        for shape in DECODES + PREFILLS
    ]
    rows.append(setup.row("copy_blocks", "64/8x128", "256 blocks x 32 layers", 1e-3, moved=10**9))
    rows.append(setup.row("rms", "64/8x128", "1 x 64", 1e-3, moved=10**9, is_paged=False))
    report("kernels", {}, rows, [table_line(row, PEERS) for row in rows])
    _, *table, _ = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows)
    assert max(map(len, table)) <= 160
    assert "12346 (1.00)" in table[2]
    assert table[-1].split()[-4:] == ["-"] * 4, "a kernel without peers"
