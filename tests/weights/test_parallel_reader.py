"""Many pieces of files, in more threads than one, come to where they belong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nano_vllm.weights import parallel_reader
from nano_vllm.weights.parallel_reader import ParallelReader

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("chunk_bytes", [8, 64, 1 << 24])
def test_tensors_are_those_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, chunk_bytes: int, seed: int
) -> None:
    monkeypatch.setattr(parallel_reader, "CHUNK_BYTES", chunk_bytes)
    draw = random.Random(seed)
    paths = [tmp_path / "a", tmp_path / "b"]
    reader, expected = ParallelReader(), []
    contents = []
    for path in paths:
        values = torch.randn(3000, generator=torch.Generator().manual_seed(draw.getrandbits(40)))
        contents.append(values)
        path.write_bytes(b"head" + values.numpy().tobytes())
    for _ in range(40):
        which, count = draw.randrange(2), draw.choice((0, 1, 2, 15, 300, 2999))
        first = draw.randint(0, 3000 - count)
        dtype = draw.choice(DTYPES)
        destination = torch.full((count,), torch.nan, dtype=dtype, device=device)
        reader.read(paths[which], 4 + 4 * first, torch.float32, destination)
        expected.append((destination, contents[which][first : first + count].to(dtype)))
    reader.finish()
    for destination, values in expected:
        assert torch.equal(destination.cpu(), values)
    reader.close()


def test_errors_name_the_file(tmp_path: Path) -> None:
    reader = ParallelReader()
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    reader.read(path, 4, torch.float32, torch.empty(2))
    with pytest.raises(ValueError, match=f"^{path} is truncated: it ends at byte 10$"):
        reader.finish()
    reader.read(path, 0, torch.float32, torch.empty(2))
    reader.finish()
    reader.close()
    with pytest.raises(FileNotFoundError):
        ParallelReader().read(tmp_path / "b", 0, torch.float32, torch.empty(2))
    other = ParallelReader()
    other.read(tmp_path, 0, torch.float32, torch.empty(2))
    with pytest.raises(ValueError, match=r"cannot be read: is a directory"):
        other.finish()
    other.close()
