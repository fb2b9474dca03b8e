"""What the benchmark of sums refuses; it runs on several GPUs alone."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from nano_vllm.bench import all_reduce


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "all_reduce needs several GPUs, got one process: torchrun"),
        (["--sizes", "8", "12"], "--sizes must be whole rows of 8192 bytes, got 12 KiB"),
        (["--sizes", "0"], "--sizes must be whole rows of 8192 bytes, got 0 KiB"),
        (["--hidden-size", "100"], "--hidden-size must be a multiple of 8 up to 32768, got 100"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    parser = ArgumentParser()
    all_reduce.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        all_reduce.run(parser.parse_args(options))
