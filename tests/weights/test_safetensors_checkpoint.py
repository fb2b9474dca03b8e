from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nano_vllm.weights import safetensors_checkpoint
from nano_vllm.weights.checkpoint import WHOLE, Region
from nano_vllm.weights.safetensors_checkpoint import SafetensorsCheckpoint

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "c": torch.ones(4, 1, dtype=torch.float16),
}


def write_shards(folder: Path, **changes: str) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / "one.safetensors")
    save_file({"c": TENSORS["c"]}, folder / "two.safetensors")
    placed = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", **changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def check(checkpoint: SafetensorsCheckpoint) -> None:
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in TENSORS.items()}
    samples = {"a": TENSORS["a"][1], "b": TENSORS["b"], "c": TENSORS["c"][2]}
    for name, expected in TENSORS.items():
        assert checkpoint.sample(name) == samples[name].view(torch.uint8).numpy().tobytes()
        assert torch.equal(checkpoint.read(name, torch.float32), expected)
        destination = torch.empty(expected.shape)
        checkpoint.read_into(name, destination)
        checkpoint.finish()
        assert torch.equal(destination, expected.float())
    checkpoint.close()


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_single_file(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    check(SafetensorsCheckpoint(tmp_path))


@pytest.mark.parametrize("remap_bytes", [1, 1 << 26])
def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remap_bytes: int) -> None:
    monkeypatch.setattr(safetensors_checkpoint, "_REMAP_BYTES", remap_bytes)
    write_shards(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    check(SafetensorsCheckpoint(tmp_path))


def test_parts(tmp_path: Path) -> None:
    tensor = torch.randn(7, 5)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    every = slice(None)
    for part in (Region(slice(2, 6)), Region(every, slice(1, 3)), Region(slice(0, 7)), WHOLE):
        expected = tensor[part.of((7, 5))]
        for dtype in (torch.float32, torch.bfloat16):
            there = torch.full((2, *expected.shape), torch.nan, dtype=dtype)
            transposed = torch.full(expected.shape[::-1], torch.nan, dtype=dtype)
            checkpoint.read_into("a", there[1], part)
            checkpoint.read_into("a", transposed.T, part)
            checkpoint.finish()
            assert torch.equal(there[1], expected.to(dtype))
            assert torch.equal(transposed.T, expected.to(dtype))
            assert there[0].isnan().all()
    checkpoint.close()


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    checkpoint.read_into("a", torch.empty(1000))
    with pytest.raises(ValueError, match="truncated: it ends at byte 2000"):
        checkpoint.finish()
    checkpoint.close()


def fails(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsCheckpoint(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    fails(tmp_path, r"two\.safetensors is missing: .* places tensor 'c' there")


def test_missing_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path, d="two.safetensors", e="two.safetensors")
    fails(tmp_path, r"two\.safetensors lacks 2 tensors .* such as 'd'")


@pytest.mark.parametrize("place", ["../one.safetensors", "/etc/passwd", 3])
def test_shard_outside_the_folder(tmp_path: Path, place: str) -> None:
    write_shards(tmp_path, a=place)
    fails(tmp_path, "tensor 'a' must be in a file beside it")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    fails(tmp_path, r"model\.safetensors\.index\.json")


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    for length in (0, 4, 8, 60, len(data) - 1):
        path.write_bytes(data[:length])
        fails(tmp_path, r"model\.safetensors is truncated or corrupt")


def test_corrupt_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + bytes(100))
    fails(tmp_path, "truncated or corrupt")
    path.write_bytes(struct.pack("<Q", 8) + b"not json" + bytes(100))
    fails(tmp_path, "truncated or corrupt")


def test_unsupported_dtype(tmp_path: Path) -> None:
    save_file({"q": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    fails(tmp_path, r"tensor 'q' has dtype I8; supported: F64, F32, F16, BF16")


def test_no_weights(tmp_path: Path) -> None:
    fails(tmp_path, "has no weights")
    (tmp_path / "pytorch_model.bin").touch()
    fails(tmp_path, "only pickled weights, which are never loaded")


def test_files_without_index(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file(TENSORS, tmp_path / name)
    fails(tmp_path, r"2 \.safetensors files but no model\.safetensors\.index\.json")
